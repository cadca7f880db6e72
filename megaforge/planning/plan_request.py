"""The command line of ``tools/plan.py memory``, read before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.planning.gpus import GPUS, gpu_named


@dataclass(frozen=True)
class Request:
    """What the command line asks of the planner: a configuration, the planner's own flags, and what to say."""

    config: Config
    own: argparse.Namespace
    notes: list[str]


def parse(arguments: Sequence[str], prog: str) -> Request:
    """Reads the planner's own flags and leaves the rest to the configuration.

    Raises:
        UserError: an unknown flag or value.
    """
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--gpus", type=integer(1, 1 << 20), help="ranks in total")
    parser.add_argument("--dp", type=integer(1, 1 << 20), help="data-parallel size, instead of --gpus")
    parser.add_argument("--search", action="store_true", help="list the fastest layouts that fit --gpus")
    parser.add_argument(
        "--share", type=number(above=0, most=1), default=0.9, help="share of the memory that a layout may fill"
    )
    parser.add_argument("--top", type=integer(1), default=10, help="layouts to list")
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
    own, rest = parser.parse_known_args(arguments)
    gpu_named(own.gpu)
    if own.search and own.gpus is None:
        raise UserError("--search needs --gpus, the number of GPUs to lay the model out on")
    parsed = parse_config(rest, prog=prog)
    config, _, notes = with_run_tokenizer(parsed.config)
    return Request(config, own, [*parsed.notes, *notes])
