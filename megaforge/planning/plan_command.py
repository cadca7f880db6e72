"""``tools/plan.py memory``: what a layout needs, or which layouts fit, before any device is paid for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.planning.gpus import GPUS, gpu_named
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.report import plan_text, search_text
from megaforge.planning.search import search
from megaforge.planning.stages import model_parts


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks of the planner: a configuration, and the planner's own flags."""

    config: Config
    own: argparse.Namespace


def parse(arguments: Sequence[str], prog: str) -> Request:
    """Reads the planner's own flags and leaves the rest to the configuration.

    Raises:
        UserError: an unknown flag or value.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpu", default="h100-80g", help=", ".join(GPUS))
    parser.add_argument("--gpus", type=int, help="ranks in total")
    parser.add_argument("--dp", type=int, help="data-parallel size, instead of --gpus")
    parser.add_argument("--search", action="store_true", help="list the fastest layouts that fit --gpus")
    parser.add_argument("--share", type=float, default=0.9, help="share of the memory that a layout may fill")
    parser.add_argument("--top", type=int, default=10, help="layouts to list")
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
    try:
        own, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    config, _, notes = with_run_tokenizer(parse_config(rest, prog=prog).config)
    for note in notes:
        print(note)
    return Request(config, own)


def planned_dtype(config: Config) -> torch.dtype:
    """The type that ``config`` computes in; bfloat16 unless it says otherwise."""
    training = config.training
    return torch.float16 if training.fp16 else torch.float64 if training.fp64 else torch.bfloat16


def planned_layout(config: Config, world_size: int, dtype: torch.dtype | None = None) -> PlannedLayout:
    """The layout of ``config``, in :func:`planned_dtype` unless ``dtype`` is given; its schedule is defined.

    Raises:
        UserError: the layout is impossible.
    """
    layout = layout_of(config, world_size, dtype or planned_dtype(config))
    _ = layout.schedule
    return layout


def run(arguments: Sequence[str], prog: str = "plan.py memory") -> None:
    """Prints the plan of one layout, or with ``--search`` the fastest layouts.

    Raises:
        UserError: an unknown GPU, or an impossible layout.
    """
    request = parse(arguments, prog)
    config, own = request.config, request.own
    gpu, parallel = gpu_named(own.gpu), config.parallel
    if own.search:
        if own.gpus is None:
            raise UserError("--search needs --gpus, the number of GPUs to lay the model out on")
        found = search(config, own.gpus, gpu, planned_dtype(config), share=own.share, count=own.top)
        print(search_text(found, gpu, config.name, own.gpus, own.share))
        return
    product = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    product *= parallel.context_parallel_size
    world_size = own.gpus or product * (own.dp or 1)
    layout = planned_layout(config, world_size)
    if own.dp is not None and layout.dp != own.dp:
        raise UserError(f"--dp {own.dp}: {world_size} GPUs leave dp {layout.dp}; give --dp or --gpus, not both")
    print(plan_text(model_parts(config.model, layout.dtype), layout, gpu, config.name))
