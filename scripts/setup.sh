#!/usr/bin/env bash
# The virtual environment of a checkout: pinned packages, torch first so that nothing pulls another build of it.
# Usage: scripts/setup.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'; then
  echo "Python 3.11 or 3.12 is needed; $python is $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
  exit 1
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then # Debian ships venv's pip as a package of its own
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq
  $sudo apt-get install -y -qq --no-install-recommends python3-venv
fi

rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
echo "Installing pinned packages into $venv (about two minutes) ..."
pip install 'torch==2.13.0'
pip install --constraint constraints.txt --editable '.[train,eval,track,kfp,dev]'
touch "$venv/.ready"
