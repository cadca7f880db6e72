"""The command lines of ``tools/plan.py``, read before torch is imported."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaforge.config.arguments import ArgumentParser, integer, number, part_of
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.config.layout_settings import given_settings
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.planning.gpus import GPUS, gpu_named
from megaforge.registry import DEVICES


@dataclass(frozen=True)
class Request:
    """What the command line asks of the planner: a configuration, the planner's own flags, what to say, and the
    settings of the layout that it names."""

    config: Config
    own: argparse.Namespace
    notes: list[str]
    kept: frozenset[str] = frozenset()


def parse(arguments: Sequence[str], prog: str) -> Request:
    """Reads the planner's own flags and leaves the rest to the configuration.

    Raises:
        UserError: an unknown flag or value.
    """
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--gpus", type=integer(1, 1 << 20), help="ranks in total")
    parser.add_argument("--dp", type=integer(1, 1 << 20), help="data-parallel size, instead of --gpus")
    parser.add_argument(
        "--search", action="store_true", help="list the fastest layouts that fit --gpus, with the flags given of them"
    )
    parser.add_argument(
        "--share", type=number(above=0, most=1), default=0.9, help="share of the memory that a layout may fill"
    )
    parser.add_argument("--top", type=integer(1), default=10, help="layouts to list")
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
    own, rest = parser.parse_known_args(arguments)
    _ = gpu_named(own.gpu)
    if own.search and own.gpus is None:
        raise UserError("--search needs --gpus, the number of GPUs to lay the model out on")
    # As of a dry run, which needs no checkpoint to begin with (--stage b).
    parsed = parse_config([*rest, "--dry-run"], prog=prog)
    config, _, notes = with_run_tokenizer(parsed.config)
    return Request(config, own, [*parsed.notes, *notes], given_settings(parsed.origins))


def parse_scaling(arguments: Sequence[str], prog: str) -> Request:
    """The flags of ``plan.py scaling``: ``gpus``, in rising order, ``gpu`` and ``weak``; the others are the run's.

    Raises:
        UserError: an unknown flag or value.
    """
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument(
        "--gpus", type=integer(1, 1 << 20), nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N",
        help="numbers of GPUs; dp is what the layout leaves of them",
    )  # fmt: skip
    parser.add_argument(
        "--weak", action="store_true", help="the global batch grows as the GPUs do, from its size on the fewest"
    )
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
    own, rest = parser.parse_known_args(arguments)
    _ = gpu_named(own.gpu)
    own.gpus = sorted(set(own.gpus))
    parsed = parse_config(rest, prog=prog)
    config, _, notes = with_run_tokenizer(parsed.config)
    return Request(config, own, [*parsed.notes, *notes])


GPUS_OF_A_SERVER = 8

# What ``plan.py docs`` fills in: the names of the marked places.
PLACES = (
    *("activations", "assumptions", "search-40b", "search-200b", "scaling-1b", "scaling-200b"),
    *("ladders", "effects", "metrics", "prometheus", "optimizers"),
)


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


@dataclass(frozen=True)
class Job:
    """What a line of ``run_scripts/slurm/cdrmix.txt`` starts: ``gpus`` ranks of the training script with
    ``arguments``."""

    name: str
    gpus: int
    arguments: tuple[str, ...]

    @property
    def config(self) -> Config:
        """The configuration of every rank."""
        return parse_config(self.arguments, prog=self.name).config


def read_jobs(table: Path) -> dict[str, Job]:
    """The jobs of a table by name; its lines are a preset, a number of servers and flags.

    Raises:
        UserError: a line is not.
    """
    jobs = {}
    for row, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        name, *rest = line.split()[:2] or ["#"]
        if name.startswith("#"):
            continue
        if not rest or not rest[0].isdigit():
            raise UserError(f"{table}: line {row} is not a preset, a number of servers and flags: {line}")
        flags = shlex.split(line)[2:]
        jobs[name] = Job(name, int(rest[0]) * GPUS_OF_A_SERVER, ("--config", name, *flags))
    return jobs


def parse_ladders(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """``jobs``, ``gpu`` and ``share`` of ``plan.py ladders``.

    Raises:
        UserError: an unknown flag, GPU or job, or a missing table.
    """
    parser = ArgumentParser(prog=prog, description="Dry-runs jobs, every rank of them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every job of the table")
    parser.add_argument("--table", type=Path, default=Path("run_scripts/slurm/cdrmix.txt"), metavar="FILE")
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--share", type=number(above=0, most=1), default=0.9, help="share of memory a rank may fill")
    own = parser.parse_args(arguments)
    _ = gpu_named(own.gpu)
    if not own.table.is_file():
        raise UserError(f"--table {own.table}: there is no such file; run this in the repository, or name one")
    jobs = read_jobs(own.table)
    unknown = next((name for name in own.names if name not in jobs), None)
    if unknown is not None:
        raise UserError(f"{unknown}: there is no such job; --table {own.table} has {', '.join(jobs)}")
    own.jobs = [jobs[name] for name in own.names or jobs]
    return own


def parse_detect(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """``device``, ``megabytes`` and ``output`` of ``plan.py detect``.

    Raises:
        UserError: an unknown flag or value.
    """
    parser = ArgumentParser(
        prog=prog,
        description="Finds devices, memory and links, and measures them; under torchrun, between the ranks too.",
    )
    parser.add_argument("--device", type=part_of(DEVICES), default="auto", help="what to look at: cpu, cuda or auto")
    parser.add_argument(
        "--megabytes", type=integer(1, 1 << 14), default=64, metavar="N", help="of the tensor that ranks sum"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON for --machine of a run and --gpu of this command's siblings"
    )
    own = parser.parse_args(arguments)
    if own.output is not None and own.output.suffix != ".json":
        raise UserError(f"--output {own.output}: the name must end in .json, by which --gpu and --machine know a file")
    return own


COMPRESSED = ("--recompute", "selective", "--compress-activations")


def parse_compression(arguments: Sequence[str], prog: str) -> tuple[str, list[str]]:
    """The configuration's name, and the flags on top, of ``plan.py compression``.

    Raises:
        UserError: a flag is wrong, or does not go with compressed activations.
    """
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("--config", default="parity")
    known, flags = parser.parse_known_args(arguments)
    _ = parse_config(["--config", known.config, *flags, *COMPRESSED], prog=prog)
    return known.config, flags


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
