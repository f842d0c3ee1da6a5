#!/usr/bin/env bash
# The environment of a CUDA machine: PyPI's torch for Linux, which brings CUDA along, the pinned packages, and TRL to measure against.
# Usage: scripts/setup_gpu.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2

rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
echo "Installing torch for CUDA and the pinned packages into $venv (about five minutes, 6 GB) ..."
pip install 'torch==2.13.0'
pip install --constraint constraints.txt --editable '.[train,eval,kfp,dev]'
pip install --no-deps 'trl==1.16.0' # a peer in benchmarks/gpu.py, no dependency; what its kernels import is there already
"$venv/bin/python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA GPU here")'
touch "$venv/.ready"
