#!/usr/bin/env python3
"""Tokenises JSONL text into Megatron's .bin/.idx files.

    python tools/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-model tokenizer.json --append-eod --workers 8

writes data/corpus_text_document.bin, .idx and .json (the sidecar). Run again after a kill, it continues. Under mpirun
or srun the ranks share the work.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: no idle threads in a tool that never multiplies

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.entry import run_entry
from megaforge.data.preprocess.plan import PreprocessSettings
from megaforge.data.tokenizer import TOKENIZER_TYPES, guess_tokenizer_type
from megaforge.data.tokenizer_files import pair_of
from megaforge.errors import UserError


def parse_arguments(arguments: list[str] | None = None) -> PreprocessSettings:
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
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin, .idx and .json")
    parser.add_argument(
        "--tokenizer-model",
        help="tokenizer.json, SentencePiece or tiktoken file, a directory with one, a model's name in Hugging Face's "
        "local cache, or a number",
    )
    parser.add_argument("--vocab-file", metavar="FILE", help="instead: vocab.json of a BPE tokenizer")
    parser.add_argument("--merge-file", metavar="FILE", help="with --vocab-file: its merges.txt")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="default: told from --tokenizer-model")
    parser.add_argument("--eod-token", help="the token that ends documents; default: the tokenizer's own")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="one dataset each")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="what a bad line does")
    parser.add_argument("--workers", type=integer(1, 4096), default=1, help="processes, on each rank")
    parser.add_argument(
        "--shard-mb", type=integer(1, 1 << 20), help="MiB of input to a unit of work (default: by the input's size)"
    )
    parser.add_argument("--no-fast", action="store_true", help="do not use gigatoken even where it is proven equal")
    parser.add_argument("--force", action="store_true", help="make it again, in place of whatever dataset is there")
    flags = parser.parse_args(arguments)
    pair = pair_of(flags.vocab_file, flags.merge_file)
    if (pair is None) == (flags.tokenizer_model is None):
        raise UserError("give either --tokenizer-model, or --vocab-file and --merge-file")
    model = pair or flags.tokenizer_model
    return PreprocessSettings(
        inputs=tuple(flags.input),
        output_prefix=flags.output_prefix,
        tokenizer_type=flags.tokenizer_type or guess_tokenizer_type(model),
        tokenizer_model=model,
        eod_token=flags.eod_token,
        json_keys=tuple(flags.json_keys),
        append_eod=flags.append_eod,
        on_error=flags.on_error,
        workers=flags.workers,
        shard_mb=flags.shard_mb,
        fast=not flags.no_fast,
        force=flags.force,
    )


def main() -> int:
    """Runs the command; 0 when the datasets are published."""
    settings = parse_arguments()
    settings.validate()
    from megaforge.data.preprocess.driver import preprocess

    _ = preprocess(settings)
    return 0


if __name__ == "__main__":
    run_entry(main, "interrupted: the finished shards are kept; run the same command again to continue")
