#!/usr/bin/env bash
# From nothing to a small trained CDRmix that writes text: environment, corpus, tokenizer, dataset, training on two
# ranks with tensor parallelism, a resume, evaluation against a bigram model, loss plot, generation.
#
#   bash run_scripts/quickstart.sh                       the running Python's own standard library as the corpus
#   bash run_scripts/quickstart.sh --input PATH [PATH..] your text instead: directories, text files, JSON Lines
#   --iters N      optimizer steps, at least 2 (default 450)
#   --output DIR   where everything goes (default runs/quickstart, or a folder of its own for each --input)
#
# Long texts of --input are cut into documents of 4,096 characters, so that some can be held out.
# Run again, it keeps what is there: environment, corpus, tokenizer, dataset and checkpoints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

inputs=() iters=450 out=""
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --input | --iters | --output) ;;
        *) fail "unknown option $1; there are --input, --iters, --output and --help" ;;
    esac
    option="$1"; shift
    [ $# -gt 0 ] && [ "${1#--}" = "$1" ] || fail "$option needs a value; see bash run_scripts/quickstart.sh --help"
    case "$option" in
        --iters) iters="$1"; shift ;;
        --output) out="$1"; shift ;;
        --input)
            while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do
                [ -e "$1" ] || fail "--input $1 does not exist; give directories or files"
                inputs+=("$(realpath "$1")"); shift
            done ;;
    esac
done
[[ "$iters" =~ ^[0-9]{1,9}$ ]] && [ "$iters" -ge 2 ] || fail "--iters $iters: give a whole number of at least 2"
if [ -z "$out" ]; then
    out="$REPO/runs/quickstart"
    # Each input has a folder of its own, so that another one never meets this one's corpus and checkpoints.
    [ ${#inputs[@]} -eq 0 ] ||
        out+="-$(basename "${inputs[0]}" | tr -c '[:alnum:]\n' '-')-$(printf '%s\n' "${inputs[@]}" | cksum | cut -d ' ' -f 1)"
fi
[ ! -e "$out" ] || [ -d "$out" ] || fail "--output $out is a file; name a directory"
out="$(realpath -m "$out")"

use_environment data,train
cd "$REPO"
mkdir -p "$out"
run() { { printf '\n$'; printf ' %q' "$@"; printf '\n'; } >&2; "$@"; }

say "1/7 corpus"
train="$out/train.jsonl" held_out="$out/heldout.jsonl"
source_flag=(--python-stdlib)
[ ${#inputs[@]} -eq 0 ] || source_flag=(--input "${inputs[@]}" --split-documents size --document-size 4096)
run "$PYTHON" tools/directory_to_jsonl.py "${source_flag[@]}" --output "$train" \
    --holdout-fraction 0.03 --holdout-output "$held_out"

say "2/7 tokenizer"
run "$PYTHON" tools/train_tokenizer.py --input "$train" --vocab-size 2048 --output "$out/tok.json"

say "3/7 dataset"
for part in train heldout; do
    run "$PYTHON" tools/preprocess_data.py --input "$out/$part.jsonl" --output-prefix "$out/$part" \
        --tokenizer-model "$out/tok.json" --append-eod --workers 2
done

say "4/7 training on two ranks (tp 2)"
export OMP_NUM_THREADS=1
# --load and --save name the same directory: the run starts where it is empty and continues where it is not.
pretrain() {
    run torchrun --standalone --nproc-per-node 2 pretrain_cdrmix.py --config cdrmix-tiny --tp 2 --device cpu \
        --micro-batch-size 8 --tokenizer-model "$out/tok.json" --data-path "$out/train_text_document" \
        --train-iters "$iters" --save "$out/checkpoints" --load "$out/checkpoints" \
        --metrics-file "$out/metrics.jsonl" --tensorboard-dir "$out/tensorboard" "$@"
}
first=$(((iters * 9 + 9) / 10 < iters ? (iters * 9 + 9) / 10 : iters - 1))
pretrain --exit-interval "$first"

say "5/7 resuming from the checkpoint for the rest of the run"
pretrain
run "$PYTHON" tools/plot_loss.py --metrics-file "$out/metrics.jsonl" --output "$out/loss.png"

say "6/7 evaluation on held-out documents, beside a bigram model of the same training split"
run "$PYTHON" tools/evaluate.py --load "$out/checkpoints" --input "$out/heldout_text_document" \
    --baseline bigram --train-data "$out/train_text_document"

say "7/7 a continuation"
run "$PYTHON" tools/generate.py --load "$out/checkpoints" --prompt "def main():" --max-new-tokens 100 --temperature 0.7 --seed 1

say "done: loss curve in $out/loss.png, metrics in $out/metrics.jsonl, checkpoints in $out/checkpoints"
if [ "$PYTHON" = "$REPO/.venv/bin/python" ]; then
    say "to use the commands of the README yourself, activate the environment first:"
    printf '\n    source %q\n\n' "$REPO/.venv/bin/activate" >&2
fi
