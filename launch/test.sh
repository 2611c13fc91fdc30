#!/usr/bin/env bash
# Makes the environment if needed and runs all tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment requirements-test.txt
ruff check .
exec python -m pytest -n 2 --dist worksteal "$@"
