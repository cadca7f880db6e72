"""The command lines of ``tools/plan.py``, read before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


# What ``plan.py docs`` fills in: the names of the marked places.
PLACES = ("activations", "assumptions", "search-40b", "search-200b", "ladders", "effects", "metrics")


def parse_docs(arguments: Sequence[str], prog: str) -> list[str]:
    """The places that ``plan.py docs`` fills.

    Raises:
        UserError: an unknown place.
    """
    parser = ArgumentParser(prog=prog, description="Writes the planner's figures into the documents that quote them.")
    parser.add_argument("names", nargs="*", help=f"default: all: {', '.join(PLACES)}")
    chosen: list[str] = parser.parse_args(arguments).names or list(PLACES)
    unknown = [name for name in chosen if name not in PLACES]
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such place; choose {', '.join(PLACES)}")
    return chosen


def parse_ladders(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """``scripts``, ``gpu`` and ``share`` of ``plan.py ladders``.

    Raises:
        UserError: an unknown flag or GPU, a missing script, or none to try.
    """
    parser = ArgumentParser(prog=prog, description="Dry-runs jobs, every rank of them.")
    parser.add_argument("scripts", nargs="*", type=Path, help="default: run_scripts/slurm/cdrmix-*.sbatch")
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--share", type=number(above=0, most=1), default=0.9, help="share of memory a rank may fill")
    own = parser.parse_args(arguments)
    gpu_named(own.gpu)
    own.scripts = own.scripts or sorted(Path("run_scripts/slurm").glob("cdrmix-*.sbatch"))
    if not own.scripts:
        raise UserError("there are no run_scripts/slurm/cdrmix-*.sbatch here; run this in the repository, or name them")
    missing = next((script for script in own.scripts if not script.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing}: there is no such script")
    return own


def parse_activations(arguments: Sequence[str], prog: str) -> None:
    """``plan.py activations`` takes nothing.

    Raises:
        UserError: it was given something.
    """
    parser = ArgumentParser(
        prog=prog, description="Prints predicted activation bytes beside those that a CPU really keeps."
    )
    _, rest = parser.parse_known_args(arguments)
    if rest:
        raise UserError(f"{rest[0]}: {prog} takes no arguments")
