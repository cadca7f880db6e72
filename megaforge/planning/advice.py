"""What a run could change to need less memory, and how much that is by the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megaforge.config.check_layout import has_experts
from megaforge.config.config import Config
from megaforge.config.run_config import ParallelConfig
from megaforge.errors import UserError
from megaforge.planning.layout import layout_of
from megaforge.planning.memory import RankMemory
from megaforge.planning.search import RECOMPUTE, worst_rank
from megaforge.planning.stages import cut_stages, model_parts

WORTH = 0.02  # of the rank's memory: less is no advice


def memory_advice(config: Config, world_size: int) -> list[str]:
    """Changes of flags that would need less memory on the fullest of ``world_size`` ranks, the most saving first, each
    with the gigabytes that it saves by the plan. What is learned stays the same.

    Raises:
        UserError: ``config`` is impossible on so many ranks.
    """
    now = fullest_rank(config, world_size)
    saved: list[tuple[float, str]] = []
    for flags, other in _changes(config):
        try:
            less = now.total - fullest_rank(other, world_size).total
        except UserError:
            continue  # not with the other flags
        if less > WORTH * now.total:
            saved.append((less, f"{flags} saves {less / 1e9:.3g} of {now.total / 1e9:.3g} GB"))
    return [text for _, text in sorted(saved, reverse=True)]


def fullest_rank(config: Config, world_size: int) -> RankMemory:
    """The memory of the fullest of ``world_size`` ranks by the plan.

    Raises:
        UserError: ``config`` is impossible on so many ranks.
    """
    layout = layout_of(config, world_size)
    parts = model_parts(config.model, layout.dtype)
    return worst_rank(parts, layout, cut_stages(parts, layout))


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    given, micro = config.parallel, config.training.micro_batch_size
    for name in RECOMPUTE[RECOMPUTE.index(given.recompute) + 1 :]:
        yield f"--recompute {name}", _with(config, recompute=name)  # of layers that the model has not: saves nothing
    for stage in range(given.zero_stage + 1, 3):
        yield f"--zero {stage}", _with(config, zero_stage=stage)
    if micro > 1:
        training = dataclasses.replace(config.training, micro_batch_size=1)
        yield "--micro-batch-size 1", dataclasses.replace(config, training=training)
    twice = 2 * given.tensor_model_parallel_size
    yield f"--tp {twice} --sp", _with(config, tensor_model_parallel_size=twice, sequence_parallel=True)
    if has_experts(config.model):
        more = 2 * given.expert_model_parallel_size
        yield f"--ep {more}", _with(config, expert_model_parallel_size=more)
    if not given.cpu_offload_activations and config.training.device != "cpu":
        yield "--cpu-offload-activations", _with(config, cpu_offload_activations=True)


def _with(config: Config, **fields: Any) -> Config:
    parallel: ParallelConfig = dataclasses.replace(config.parallel, **fields)
    return dataclasses.replace(config, parallel=parallel)
