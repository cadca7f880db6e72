#!/usr/bin/env bash
# The BitNet example from nothing: environment, corpus, tokenizer, dataset, then examples/bitnet/arms.py. About 4,100 steps.
#
#   bash examples/bitnet/run.sh [--output DIR] [FLAGS OF arms.py]      (default: runs/bitnet)
#
# The corpus is the running Python's own standard library, as in the quickstart. Run again, it keeps what is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../run_scripts/environment.sh"
out="$REPO/runs/bitnet"
if [ "${1:-}" = --output ]; then
    [ $# -gt 1 ] || fail "--output needs a value: a directory"
    out="$(realpath -m "$2")"; shift 2
fi
use_environment data,train
cd "$REPO"
mkdir -p "$out"
export OMP_NUM_THREADS=1
say "corpus, tokenizer, dataset"
"$PYTHON" tools/directory_to_jsonl.py --python-stdlib --output "$out/train.jsonl" \
    --holdout-fraction 0.03 --holdout-output "$out/heldout.jsonl"
"$PYTHON" tools/train_tokenizer.py --input "$out/train.jsonl" --vocab-size 2048 --output "$out/tok.json"
for part in train heldout; do
    "$PYTHON" tools/preprocess_data.py --input "$out/$part.jsonl" --output-prefix "$out/$part" \
        --tokenizer-model "$out/tok.json" --append-eod --workers 2
done
say "models"
"$PYTHON" examples/bitnet/arms.py --data "$out/train_text_document" --heldout "$out/heldout_text_document" \
    --tokenizer "$out/tok.json" --output "$out/arms" "$@"
