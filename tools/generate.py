#!/usr/bin/env python3
"""Continues a text with a trained model.

    python tools/generate.py --load runs/small --prompt "The list of" --max-new-tokens 100
    torchrun --nproc-per-node 2 tools/generate.py --load runs/small --prompt "def main" --temperature 0

The checkpoint says which model and tokenizer it is. Under torchrun the ranks share the model (--tp, all of them by
default), whatever layout it was trained at. The text appears as it is drawn.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.config.entry import run_entry
from megaforge.config.launcher import discover_launch

if TYPE_CHECKING:
    from megaforge.data.tokenizer import Tokenizer
    from megaforge.training.restore import TrainedModel


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, metavar="DIR", help="a run's --save directory, or one checkpoint")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to go on from")
    parser.add_argument("--max-new-tokens", type=integer(0), default=100, help="tokens to draw at most")
    parser.add_argument("--temperature", type=number(0), default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=integer(0), default=0, help="draw among this many most likely tokens; 0: all")
    parser.add_argument(
        "--top-p", type=number(above=0, most=1), default=0.95, help="draw among the most likely of this total share"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of the draws")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="where the tokenizer is now, if it was moved")
    parser.add_argument("--tp", type=integer(1), help="tensor-parallel size (default: all ranks)")
    parser.add_argument("--pp", type=integer(1), default=1, help="pipeline stages: 1, whatever the run was trained at")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto", help="where to compute")
    return parser.parse_args(arguments)


class TextPrinter:
    """Prints tokens as text, as soon as their bytes make whole characters."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt)
        self.shown = tokenizer.decode(self.tokens)

    def add(self, token: int) -> None:
        """Takes in one more token."""
        self.tokens.append(token)
        self.show()

    def show(self, final: bool = False) -> None:
        """Prints what is new. A character whose last bytes are to come (U+FFFD at the end) waits, unless ``final``."""
        text = self.tokenizer.decode(self.tokens)
        if final or (text.startswith(self.shown) and not text.endswith("\ufffd")):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def write_continuation(flags: argparse.Namespace, trained: TrainedModel, tokenizer: Tokenizer) -> None:
    """Draws the continuation on all ranks; rank 0 prints the prompt and it."""
    from megaforge.training.generation import Sampling, generate

    prompt = tokenizer.encode(flags.prompt)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    printer = TextPrinter(tokenizer, prompt) if trained.ctx.is_first_rank else None
    if printer:
        print(flags.prompt, end="", flush=True)
    for token in generate(trained.model, prompt, flags.max_new_tokens, sampling, tokenizer.eod):
        if printer:
            printer.add(token)
    if printer:
        printer.show(final=True)
        print()


def main() -> int:
    flags = parse_arguments()
    discover_launch()
    from megaforge.parallel.distributed import shutdown
    from megaforge.training.restore import load_trained_model

    trained = load_trained_model(flags.load, tp=flags.tp, pp=flags.pp, device=flags.device)
    write_continuation(flags, trained, trained.load_tokenizer(flags.tokenizer_model))
    shutdown()
    return 0


if __name__ == "__main__":
    run_entry(main)
