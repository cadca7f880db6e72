#!/usr/bin/env bash
# Submits a CDRmix variant or moe-5b with the servers and the layout that cdrmix.txt has for it. Further flags go to
# pretrain_cdrmix.py, and come after the table's:
#   bash run_scripts/slurm/cdrmix.sh cdrmix-core-4b --data-path PREFIX --tokenizer-model FILE --save DIR --load DIR
# sbatch reads SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT and the like from the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
table=run_scripts/slurm/cdrmix.txt

while read -r name servers flags; do
    [ "$name" = "${1:-}" ] || continue
    read -ra flags <<<"$flags"
    exec sbatch --job-name="$name" --nodes="$servers" run_scripts/slurm/pretrain.sbatch --config "$name" "${flags[@]}" "${@:2}"
done < <(grep -v '^#' "$table")
echo "error: '${1:-}' is not a variant of $table; it has $(grep -v '^#' "$table" | cut -d ' ' -f 1 | xargs)" >&2
exit 2
