#!/usr/bin/env bash
# What takes minutes: the whole quickstart, 500 random wrong inputs for every command, all layouts in both precisions,
# Triton's interpreter, the curves of small recipes, the arms of the examples grokking and bitnet, sixty faults in a run, a node lost and taken back,
# every wait for the disk, rename and checksum taken out once, twenty checks of the program taken out, ten minutes of damaged files for each reader. Every step
# runs, whatever became of those before; the status is 1 when one failed.
#
#   bash run_scripts/nightly.sh            all steps          bash run_scripts/nightly.sh sweep parity   some of them
#   SEED=7 bash run_scripts/nightly.sh     other random inputs (default: the day's number)
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO" || exit 1

declare -A steps=(
    [quickstart]='bash run_scripts/quickstart.sh --output "$(mktemp -d)"'
    [sweep]='"$PYTHON" -m tests.sweep --cases 500 --seed "${SEED:-$(date +%j)}"'
    [parity]='"$PYTHON" tools/parity.py && "$PYTHON" tools/parity.py --dtype fp32'
    [grokking]='"$PYTHON" examples/grokking/arms.py --check --seeds 0 1 2 --output "$(mktemp -d)"'
    [bitnet]='bash examples/bitnet/run.sh --output "$(mktemp -d)" --check'
    [triton]='bash run_scripts/check_triton.sh'
    [elastic]='"$PYTHON" -m tests.elastic'
    [convergence]='bash run_scripts/convergence.sh'
    [fuzz]='"$PYTHON" -m tests.fuzz --minutes 10 --seed "${SEED:-$(date +%j)}"'
    [mutations]='"$PYTHON" -m tests.mutations'
    [checks]='"$PYTHON" -m tests.mutations --checks 20 --seed "${SEED:-$(date +%j)}"'
    [chaos]='bash run_scripts/chaos.sh --faults 60 --seed "${SEED:-1}" --minutes 120'
)
order=(quickstart sweep parity convergence grokking bitnet triton chaos elastic mutations checks fuzz)

for name in "$@"; do
    [ -n "${steps[$name]:-}" ] || fail "$name: no such step; there are ${order[*]}"
done
use_environment data,train,test || fail "the environment could not be made"
export OMP_NUM_THREADS=1
failed=()
for name in "${@:-${order[@]}}"; do
    say "$name"
    started=$SECONDS
    eval "${steps[$name]}" || failed+=("$name")
    echo "$name: $((SECONDS - started)) s"
done
[ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]}"
say "all steps passed"
