# shellcheck shell=bash
# Sourced by pretrain.sbatch: what becomes of the job once its ranks have ended.
#
#   saved_below "$@"               the directory of --save in a command line, or nothing
#   faulty_node FILE               the node that messages of srun and torchrun in FILE blame first, or nothing
#   after_ranks STATUS FILE DIR    ends the script: complete, requeued, or failed
#
# DIR/faults.txt has a line for each attempt that failed: time, job, attempt, status, node, newest checkpoint. A node with
# MAX_FAULTS of them (2) is excluded when the job is requeued; take its lines out to have it back. No further attempt is
# made after MAX_STUCK (3) in a row that failed without a new checkpoint, nor after MAX_REQUEUES (10).

# Whatever writes to a pipe is read to its end here: with pipefail, one that is not ends the script.

MAX_REQUEUES="${MAX_REQUEUES:-10}"
MAX_FAULTS="${MAX_FAULTS:-2}"
MAX_STUCK="${MAX_STUCK:-3}"

saved_below() {
    local word next=""
    for word in "$@"; do
        if [ -n "$next" ]; then
            printf '%s\n' "$word"
            return
        fi
        case "$word" in
            --save) next=1 ;;
            --save=*)
                printf '%s\n' "${word#--save=}"
                return
                ;;
        esac
    done
}

# What torchrun's summaries in FILE blame first, as "TIME NODE STATUS"; nothing where there is none. SLURM's names of nodes
# have no domain.
root_cause() {
    awk '/^Root Cause/ { cause = 1 }
         cause && $1 == "time" && $2 == ":" { time = $3 }
         cause && $1 == "host" && $2 == ":" { host = $3; sub(/[.].*/, "", host) }
         cause && $1 == "exitcode" && $2 == ":" { print time, host, $3; cause = 0 }' "$1" | sort | sed -n 1p
}

# Where SLURM itself has lost a node, that one; else torchrun's, if the job has a node of that name; else the first of
# "srun: error: NODE: task 3: Killed". What came first is the cause; what followed are its victims.
faulty_node() {
    local found
    found="$(sed -nE 's/.*error: Node failure on ([^ ,]+).*/\1/p' "$1" | sed -n 1p)"
    if [ -z "$found" ]; then
        found="$(root_cause "$1" | cut -d ' ' -f 2)"
        scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | grep -xF -e "$found" >/dev/null || found=""
    fi
    [ -n "$found" ] || found="$(sed -nE 's/^srun: error: ([^ :]+): tasks? [0-9,-]+: .*/\1/p' "$1" | sed -n 1p)"
    printf '%s\n' "$found"
}

# Nodes of the file $1 that have MAX_FAULTS lines or more, with commas between them.
excluded_nodes() {
    [ -f "$1" ] || return 0
    awk -v most="$MAX_FAULTS" '$5 != "-" && ++faults[$5] == most { print $5 }' "$1" | sort -u | paste -sd, -
}

# Starts the job again, without the nodes $1. SLURM ends this script meanwhile, which therefore does not listen: only a
# job that is to start again can be told where not to.
requeue() {
    local exclude="$1" attempt
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" || return 1
    [ -n "$exclude" ] || return 0
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$exclude"; then
            echo "requeued without $exclude (attempt $attempt)" >&2
            return 0
        fi
        sleep "${REQUEUE_PAUSE:-1}"
    done
    echo "warning: $exclude could not be excluded" >&2
}

# How many attempts in a row, the newest ones of the file $1, have failed with the same newest checkpoint.
stuck_attempts() {
    awk '{ count = $6 == last ? count + 1 : 1; last = $6 } END { print count + 0 }' "$1"
}

after_ranks() {
    local status="$1" said="$2" save="$3" attempt="${SLURM_RESTART_COUNT:-0}" node newest stuck
    local again="${REQUEUE_STATUS:-85}"
    if [ -z "$save" ]; then
        exit "$status" # nothing to go on from
    fi
    if [ -f "$save/completed" ]; then exit 0; fi
    if [ "$status" -eq 0 ] && [ ! -f "$save/unfinished" ]; then exit 0; fi
    if [ "$status" -eq 2 ] || [ "$(root_cause "$said" | cut -d ' ' -f 3)" = 2 ]; then
        echo "not requeued: the same line would end in the same error, which stands above" >&2
        exit 2
    fi
    if [ "$status" -ne 0 ] && [ "$status" -ne "$again" ]; then
        node="$(faulty_node "$said")"
        newest="$(cat "$save/latest" 2>/dev/null || true)"
        mkdir -p "$save"
        echo "$(date -u +%FT%TZ) $SLURM_JOB_ID $attempt $status ${node:--} ${newest:--}" >>"$save/faults.txt"
        echo "fault on ${node:-an unknown node}, status $status (noted in $save/faults.txt)" >&2
        stuck="$(stuck_attempts "$save/faults.txt")"
        if [ "$stuck" -ge "$MAX_STUCK" ]; then
            echo "not requeued: $stuck attempts in a row failed after ${newest:-no checkpoint}" >&2
            exit "$status"
        fi
    fi
    if [ "$attempt" -ge "$MAX_REQUEUES" ]; then
        echo "not requeued: SLURM has started it again $attempt times (MAX_REQUEUES=$MAX_REQUEUES)" >&2
        exit "$((status == 0 ? again : status))"
    fi
    requeue "$(excluded_nodes "$save/faults.txt")" || exit "$((status == 0 ? again : status))"
    exit "$again"
}
