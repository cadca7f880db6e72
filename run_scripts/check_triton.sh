#!/usr/bin/env bash
# Runs the Triton kernels in Triton's interpreter and compiles them for sm_80 and sm_90, on a machine without a GPU.
# Triton goes into build/triton, out of the way: beside a CPU build of torch, other packages take it for a sign of a GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment data,train,test
cd "$REPO"
"$PYTHON" -c 'import triton' 2>/dev/null || export PYTHONPATH="$REPO/build/triton${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import triton' 2>/dev/null || "$PYTHON" -m pip install -q --no-deps --target build/triton "triton==3.6.0"
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -q tests/kernels/test_triton.py "$@"
