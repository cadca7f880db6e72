#!/usr/bin/env bash
# Trains one small recipe of each family of models and compares what it learns with the curves in
# tests/convergence/curves.json: a point more than 3 % off, better or worse, fails. Nightly; minutes on two cores.
#
#   bash run_scripts/convergence.sh                  all          bash run_scripts/convergence.sh rwkv7 bitnet   some
#   bash run_scripts/convergence.sh --update         keep what was trained, after a change that is meant to move curves
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO"
use_environment data,train,test || fail "the environment could not be made"
export OMP_NUM_THREADS=1
"$PYTHON" -m tests.convergence "$@"
