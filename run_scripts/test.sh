#!/usr/bin/env bash
# Sets up and runs all tests, files of them side by side on up to four cores; further arguments go to pytest, e.g.
#   bash run_scripts/test.sh tests/parallel -x          bash run_scripts/test.sh -n 0 --pdb tests/nn   (one process)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment data,train,test
cd "$REPO"

# Outside implementations that our layers are compared with. Installed without their dependencies, which would replace
# torch or want a GPU; the tests that need them skip, saying so, where they are missing.
if ! "$PYTHON" -c 'import importlib.metadata as m; m.version("rwkv"); m.version("fla-core")' 2>/dev/null; then
    say "installing the outside oracles (rwkv, fla-core)"
    "$PYTHON" -m pip install -q --no-deps -r tests/oracles/requirements.txt || say "the oracles are not to be had; their tests will skip"
fi

say "running the tests"
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # which would answer with the threads of OpenMP
# Many processes share few cores in the parallel tests, so each keeps to one thread.
export OMP_NUM_THREADS=1
# A file's tests stay in one process, as they share what its fixtures made; files start in their order, so that the
# longest, which are in the middle, are not the last.
"$PYTHON" -m pytest -n "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder "$@"
