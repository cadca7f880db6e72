"""The command line of ``tools/parity.py``, read before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.cli import parse_config
from megaforge.config.launcher import discover_launch
from megaforge.verification.parity_layouts import ParityLayout, choose_layouts


@dataclass(frozen=True)
class Options:
    """What the command line asks for; ``flags`` are those of a training run, on top of the configuration ``name``."""

    layouts: list[ParityLayout]
    named: bool
    dtype: str
    max_ranks: int
    name: str
    flags: tuple[str, ...]


def parse_options(argv: Sequence[str]) -> Options:
    """
    Raises:
        UserError: an unknown layout or type; the flags of the run are checked layout by layout.
    """
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--layouts", default="")
    parser.add_argument("--dtype", default="fp64", choices=("fp64", "fp32"))
    parser.add_argument("--max-ranks", type=integer(1, 1 << 20), default=8)
    parser.add_argument("--config", default="parity")
    known, flags = parser.parse_known_args(argv)
    _ = parse_config(["--config", known.config, *flags])
    _ = discover_launch()
    names = [name for name in known.layouts.split(",") if name]
    return Options(
        choose_layouts(names), bool(names), known.dtype, known.max_ranks, known.config, ("--device", "cpu", *flags)
    )
