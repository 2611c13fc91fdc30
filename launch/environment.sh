# shellcheck shell=bash
# Sourced by the other scripts: makes .venv and installs a requirements file, once for each version of it.
environment() {
  local requirements=$1 stamp
  stamp=.venv/installed-$(cat requirements*.txt | sha256sum | cut -c1-16)-$requirements
  if [ ! -e "$stamp" ]; then
    echo "Installing $requirements into .venv (once; a few minutes) ..."
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" 2> >(grep -v '^WARNING: Location' >&2)
    touch "$stamp"
  fi
  PATH=$PWD/.venv/bin:$PATH
}
