#!/bin/sh
# Make a virtual environment with pip in it: make_venv.sh PYTHON FOLDER
# Some distributions split `venv` from Python; there `virtualenv` does the same, fetched into a folder
# of our own (which is allowed even where the system's Python is marked as externally managed).
set -eu
python=$1 folder=$2
if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  "$python" -m venv --clear "$folder"
elif "$python" -m pip --version >/dev/null 2>&1; then
  tools=$(mktemp -d)
  trap 'rm -rf "$tools"' EXIT
  "$python" -m pip install --quiet --target "$tools" virtualenv
  PYTHONPATH="$tools" "$python" -m virtualenv --quiet --clear "$folder"
else
  echo "$python has neither venv nor pip: install them (Debian, Ubuntu: apt install python3-venv)" >&2
  exit 1
fi
