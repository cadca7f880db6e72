#!/usr/bin/env bash
# From nothing to a small trained CDRmix that writes text: environment, corpus, tokenizer, dataset, training on two
# ranks with tensor parallelism, evaluation against a bigram model, loss plot, a resume, generation.
#
#   bash run_scripts/quickstart.sh                        the running Python's own standard library as the corpus
#   bash run_scripts/quickstart.sh --input DIR|FILE.jsonl your text instead
#   --iters N      optimizer steps (default 450)          --output DIR   where everything goes (default runs/quickstart)
#
# Run again, it keeps what is there: environment, corpus, dataset and checkpoints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

input="" iters=450 out="$REPO/runs/quickstart"
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || fail "$1 needs a value; see the head of run_scripts/quickstart.sh"
    case "$1" in
        --input) input="$(realpath "$2")" ;;
        --iters) iters="$2" ;;
        --output) out="$(realpath -m "$2")" ;;
        *) fail "unknown option $1; there are --input, --iters and --output" ;;
    esac
    shift 2
done
[ -z "$input" ] || [ -e "$input" ] || fail "--input $input does not exist"

use_environment data,train
cd "$REPO"
mkdir -p "$out"
run() { printf '\n$ %s\n' "$*" >&2; "$@"; }

say "1/7 corpus"
train="$out/train.jsonl" held_out="$out/heldout.jsonl"
if [ -s "$train" ] && [ -s "$held_out" ]; then
    echo "keeping $train and $held_out"
else
    source_flag=(--python-stdlib)
    [ -z "$input" ] || source_flag=(--input "$input")
    run "$PYTHON" tools/directory_to_jsonl.py "${source_flag[@]}" --output "$train" \
        --holdout-fraction 0.03 --holdout-output "$held_out"
fi

say "2/7 tokenizer"
[ -s "$out/tok.json" ] && echo "keeping $out/tok.json" ||
    run "$PYTHON" tools/train_tokenizer.py --input "$train" --vocab-size 2048 --output "$out/tok.json"

say "3/7 dataset"
for part in train heldout; do
    run "$PYTHON" tools/preprocess_data.py --input "$out/$part.jsonl" --output-prefix "$out/$part" \
        --tokenizer-model "$out/tok.json" --append-eod --workers 2
done

say "4/7 training on two ranks (tp 2)"
export OMP_NUM_THREADS=1
common=(--config cdrmix-tiny --micro-batch-size 8 --tokenizer-model "$out/tok.json" --data-path "$out/train_text_document"
    --device cpu --save "$out/checkpoints" --load "$out/checkpoints"
    --metrics-file "$out/metrics.jsonl" --tensorboard-dir "$out/tensorboard")
pretrain() { run torchrun --standalone --nproc-per-node 2 pretrain_cdrmix.py "${common[@]}" --tp 2 "$@"; }
first=$((iters * 9 / 10))
pretrain --train-iters "$iters" --exit-interval "$first" --save-interval "$first"

say "5/7 resuming from the checkpoint for the rest of the run"
pretrain --train-iters "$iters"
run "$PYTHON" tools/plot_loss.py --metrics-file "$out/metrics.jsonl" --output "$out/loss.png"

say "6/7 evaluation on held-out documents, beside a bigram model of the same training split"
run "$PYTHON" tools/evaluate.py --load "$out/checkpoints" --input "$out/heldout_text_document" \
    --baseline bigram --train-data "$out/train_text_document"

say "7/7 a continuation"
run "$PYTHON" tools/generate.py --load "$out/checkpoints" --prompt "def main():" --max-new-tokens 100 --temperature 0.7 --seed 1

say "done: loss curve in $out/loss.png, metrics in $out/metrics.jsonl, checkpoints in $out/checkpoints"
