#!/usr/bin/env python3
"""Trains a tokenizer on JSONL text.

    python tools/train_tokenizer.py --input train.jsonl --vocab-size 4096 --output tok.json
    python tools/train_tokenizer.py --input train.jsonl.zst --vocab-size 32000 --type sentencepiece --output sp.model

The first is byte-level BPE with <|endoftext|> (Hugging Face tokenizers); the second a SentencePiece
unigram model, or with --model-type bpe one of byte pairs, like Llama 2's.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.entry import run_entry
from megaforge.data.train_tokenizer import KINDS, MODEL_TYPES, TokenizerSettings, train_tokenizer


def parse_arguments(arguments: list[str] | None = None) -> TokenizerSettings:
    """The settings that the command line asks for."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines (.jsonl, .ndjson, .json) or text, one document a file, each also .gz or .zst; "
        "Parquet files, or a directory of them or of Hugging Face datasets",
    )
    parser.add_argument("--output", required=True, help="a .json file, or .model for SentencePiece")
    parser.add_argument(
        "--vocab-size", type=integer(1, 1 << 31), required=True, help="number of tokens, control tokens included"
    )
    parser.add_argument("--type", choices=KINDS, default="bpe", help="the kind of tokenizer")
    parser.add_argument(
        "--model-type", choices=MODEL_TYPES, help="the kind of SentencePiece model (default: unigram, as spm_train)"
    )
    parser.add_argument("--json-key", default="text", help="the key of the text")
    parser.add_argument("--max-bytes", type=integer(1), default=256 << 20, help="train on a sample of about this size")
    parser.add_argument("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="further control tokens")
    parser.add_argument("--force", action="store_true", help="replace an --output that holds another tokenizer")
    flags = parser.parse_args(arguments)
    return TokenizerSettings(
        inputs=tuple(flags.input),
        output=flags.output,
        vocab_size=flags.vocab_size,
        kind=flags.type,
        model_type=flags.model_type,
        json_key=flags.json_key,
        max_bytes=flags.max_bytes,
        special_tokens=tuple(flags.special_tokens),
        force=flags.force,
    )


def main() -> int:
    """Runs the command; 0 when the tokenizer is written."""
    _ = train_tokenizer(parse_arguments())
    return 0


if __name__ == "__main__":
    run_entry(main)
