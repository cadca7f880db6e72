#!/usr/bin/env bash
# A real job of several ranks on real text meets the faults of a seeded plan: kills, hangs, damaged files, full disks ...
# It must end as a run that nothing disturbed: tests/chaos, docs/chaos.md.
#
#   bash run_scripts/chaos.sh --faults 60 --seed 1          --minutes M bounds it, --output DIR keeps everything
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO"
case " $* " in *" -h "* | *" --help "*) exec python3 -m tests.chaos --help ;; esac
use_environment data,train,test
export OMP_NUM_THREADS=1
exec "$PYTHON" -m tests.chaos "$@"
