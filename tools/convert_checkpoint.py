#!/usr/bin/env python3
"""Turns weights published by others into a checkpoint that --load takes.

    python tools/convert_checkpoint.py --from rwkv7 RWKV-x070-World-0.1B.pth --save checkpoints/rwkv7-0.1b

The checkpoint holds the model's configuration and its weights, exactly. Continue from it with
``pretrain_cdrmix.py --config DIR/model.yaml --load DIR --finetune ...``, or use it with tools/generate.py and
tools/evaluate.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.checkpoint.import_rwkv7 import MODEL_FILE, import_rwkv7
from megaforge.config.config import Config
from megaforge.config.entry import run_entry
from megaforge.data.tokenizer import TOKENIZER_TYPES, guess_tokenizer_type, load_tokenizer
from megaforge.training.state import tokenizer_identity


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="the published weights")
    parser.add_argument("--from", dest="source", required=True, choices=("rwkv7",), help="whose format FILE is in")
    parser.add_argument("--save", required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--tokenizer-model", help="the model's tokenizer, recorded in the checkpoint")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="default: told from --tokenizer-model")
    return parser.parse_args(arguments)


def main() -> int:
    """Runs the command; 0 when the checkpoint is published."""
    flags = parse_arguments()
    config, identity = Config(), None
    if flags.tokenizer_model:
        kind = flags.tokenizer_type or guess_tokenizer_type(flags.tokenizer_model)
        identity = tokenizer_identity(load_tokenizer(kind, flags.tokenizer_model))
        data = dataclasses.replace(config.data, tokenizer_type=kind, tokenizer_model=flags.tokenizer_model)
        config = dataclasses.replace(config, data=data)
    path = import_rwkv7(flags.file, flags.save, config, identity)
    print(f"{path}: written from {flags.file}")
    print(f"continue from it with: --config {os.path.join(flags.save, MODEL_FILE)} --load {flags.save} --finetune")
    return 0


if __name__ == "__main__":
    run_entry(main)
