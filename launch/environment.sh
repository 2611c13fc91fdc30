# shellcheck shell=bash
# Sourced by the other scripts: makes .venv and installs a requirements file and this folder, once for each version of it.
environment() {
  local requirements=$1 stamp python
  stamp=.venv/installed-$(cat requirements*.txt | sha256sum | cut -c1-16)-$requirements
  if [ ! -e "$stamp" ]; then
    echo "Installing $requirements into .venv (once; a few minutes) ..."
    if [ ! -x .venv/bin/pip ]; then
      python=$(new_python) || exit 2
      "$python" -m venv --clear .venv
    fi
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r "$requirements" -e . 2> >(grep -v '^WARNING: Location' >&2)
    touch "$stamp"
  fi
  PATH=$PWD/.venv/bin:$PATH
  unset PYTHONDONTWRITEBYTECODE # pip left the packages uncompiled: each module is compiled once, by whoever imports it first
}

new_python() { # the first that is new enough
  local python
  for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then echo "$python"; return; fi
  done
  echo 'error: Python 3.11 or newer is needed; PYTHON=/path/to/python names one.' >&2
  exit 2
}
