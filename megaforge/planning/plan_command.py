"""``tools/plan.py memory``: what a layout needs, or which layouts fit, before any device is paid for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megaforge.config.config import Config
from megaforge.config.micro_batch_config import AUTO
from megaforge.config.teacher import teacher_model
from megaforge.errors import UserError
from megaforge.planning.auto_micro_batch import choose_micro_batch
from megaforge.planning.gpus import gpu_named
from megaforge.planning.host_copies import host_copies
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.plan_request import parse
from megaforge.planning.report import gigabytes, plan_text, search_text
from megaforge.planning.search import search
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.planning.time import step_time


def planned_layout(config: Config, world_size: int) -> PlannedLayout:
    """The layout of ``config`` in the type that training would compute in; its schedule is defined.

    Raises:
        UserError: the layout is impossible.
    """
    layout = layout_of(config, world_size)
    _ = layout.schedule
    return layout


def run(arguments: Sequence[str], prog: str = "plan.py memory") -> None:
    """Prints the plan of one layout, or with ``--search`` the fastest layouts.

    Raises:
        UserError: an unknown GPU, or an impossible layout.
    """
    request = parse(arguments, prog)
    for note in request.notes:
        print(note)
    config, own = request.config, request.own
    if (untold := teacher_model(config)[1]) is not None:
        print(untold)
    gpu, parallel = gpu_named(own.gpu), config.parallel
    chooses = config.training.micro_batch_size == AUTO
    if own.search:
        kept = request.kept - {"training.micro_batch_size"} if chooses else request.kept
        found = search(config, own.gpus, gpu, share=own.share, count=own.top, kept=kept)
        print(search_text(found, gpu, config.name, own.gpus, own.share))
        return
    product = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    product *= parallel.context_parallel_size
    world_size = own.gpus or product * (own.dp or 1)
    if chooses:
        size, why = choose_micro_batch(config, world_size, gpu)
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_size=size))
        print(why)
    layout = planned_layout(config, world_size)
    if own.dp is not None and layout.dp != own.dp:
        raise UserError(f"--dp {own.dp}: {world_size} GPUs leave dp {layout.dp}; give --dp or --gpus, not both")
    parts = model_parts(config.model, layout.dtype)
    print(plan_text(parts, layout, gpu, config.name))
    if (tokens := config.length.train_tokens) is not None:
        speed = step_time(parts, layout, cut_stages(parts, layout), gpu).tokens_per_second
        print(f"--train-tokens {tokens:,}: {tokens / speed / 86400:,.1f} days of {world_size} x {gpu.name} by that")
    if copies := host_copies(config, parts, layout):
        named = ", ".join(f"{flag} {gigabytes(size)}" for flag, size in copies.items())
        print(f"copies in host memory: {gigabytes(sum(copies.values()))} GB a rank ({named})")
