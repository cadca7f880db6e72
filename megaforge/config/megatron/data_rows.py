"""Megatron-LM's flags of data, tokenizers and evaluation that are none of ours."""

from __future__ import annotations

from megaforge.config.megatron.rows import ANY, Outcome, Row, advice, becomes, noop, only, refuse

_TOKENIZER = "write what it says into the tokenizer.json of --tokenizer-model; leave it out"
_EVALUATION = "is for tools/evaluate.py, which evaluates a checkpoint; leave it out"
_SENTENCEPIECE = becomes("--tokenizer-type SentencePieceTokenizer")
_OTHER = refuse("choose HuggingFaceTokenizer, SentencePieceTokenizer or NullTokenizer")

DATA_ROWS: tuple[Row, ...] = (
    *noop(
        0,
        "no-mmap-bin-files no-create-attention-mask-in-dataloader dataloader-fast-cache-load trust-remote-code "
        "use-gigatoken",
    ),
    *noop(1, "data-cache-path num-dataset-builder-threads mid-level-dataset-surplus"),
    *noop(ANY, "tiktoken-*"),
    only("dataloader-type", "single", "samples are drawn once each, in an order that --seed sets; write single"),
    *advice(1, _TOKENIZER, "vocab-extra-ids tokenizer-metadata"),
    *advice(ANY, _TOKENIZER, "tokenizer-special-tokens"),
    *advice(0, _EVALUATION, "test-mode"),
    *advice(
        ANY,
        "evaluations read the first --eval-iters batches of the validation data; leave it out",
        "full-validation eval-micro-batch-size start-eval-at-iter multiple-validation-sets",
    ),
)

DATA_VALUES: dict[str, dict[str, Outcome]] = {
    "tokenizer-type": {
        **{name.lower(): _SENTENCEPIECE for name in ("GPTSentencePieceTokenizer", "Llama2Tokenizer")},
        **{name.lower(): _OTHER for name in ("BertWordPieceLowerCase", "BertWordPieceCase", "SFTTokenizer")},
        **{name.lower(): _OTHER for name in ("MultimodalTokenizer", "NullMultimodalTokenizer")},
    },
}
