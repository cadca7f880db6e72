"""Every valid layout of a model on some GPUs, and the fastest that fit."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from megaforge.config.check_layout import common_experts
from megaforge.config.config import Config
from megaforge.config.pattern import blocks_of
from megaforge.config.run_config import default_expert_tensor_parallel_size
from megaforge.errors import UserError
from megaforge.parallel.layer_context import compute_dtype
from megaforge.planning.gpus import ROOM, Efficiency, Gpu
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.memory import RankMemory, least_memory, rank_memory, rank_state
from megaforge.planning.stages import ModelParts, StagePart, cut_stages, model_parts
from megaforge.planning.time import StepTime, stage_times, step_time
from megaforge.registry import SCHEDULES

MICRO_BATCHES = (1, 2, 4)
RECOMPUTE = ("none", "selective", "moe", "full")  # cheapest first
STAGES_OF_A_RANK = {"parallel.virtual_pipeline_model_parallel_size", "parallel.num_layers_per_virtual_pipeline_stage"}
ROUNDS = 4  # micro-batches, in multiples of the stages, after which a pipeline repeats itself


@dataclass(frozen=True)
class Found:
    """A layout that fits: its fullest rank, and its step."""

    layout: PlannedLayout
    memory: RankMemory
    time: StepTime


def divisors(number: int, largest: int) -> list[int]:
    """The divisors of ``number`` up to ``largest``."""
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]


def candidates(config: Config, gpus: int, node_size: int = 8, kept: Collection[str] = ()) -> Iterator[PlannedLayout]:
    """Valid layouts without recomputation: tp and etp within a server, sequence parallelism wherever there is tp,
    ZeRO-1, every schedule that the micro-batches allow. ``--cp`` is the configuration's.

    Args:
        kept: keys of settings (``parallel.zero_stage``) of which every layout has the configuration's value.
    """
    given, cp = config.parallel, config.parallel.context_parallel_size
    experts = common_experts(config.model)

    def either(key: str, others: Sequence[Any]) -> Sequence[Any]:
        return [_value(config, key)] if key in kept else others

    for tp in either("parallel.tensor_model_parallel_size", divisors(gpus, node_size)):
        for pp in either("parallel.pipeline_model_parallel_size", divisors(gpus // tp, 64)):
            stage_ranks = gpus // pp
            eps = either("parallel.expert_model_parallel_size", divisors(experts, stage_ranks))
            for ep, micro in product(eps, either("training.micro_batch_size", MICRO_BATCHES)):
                etps = sorted({1, default_expert_tensor_parallel_size(tp, ep, stage_ranks)}) if experts > 1 else [None]
                schedules = _schedules(config, pp, kept)
                for etp, (name, vpp) in product(either("parallel.expert_tensor_parallel_size", etps), schedules):
                    [sp] = either("parallel.sequence_parallel", [tp > 1])
                    [zero] = either("parallel.zero_stage", [1 if gpus > 1 else 0])
                    parallel = dataclasses.replace(
                        given,
                        tensor_model_parallel_size=tp,
                        context_parallel_size=cp,
                        pipeline_model_parallel_size=pp,
                        virtual_pipeline_model_parallel_size=vpp,
                        pipeline_schedule=name,
                        expert_model_parallel_size=ep,
                        expert_tensor_parallel_size=etp,
                        sequence_parallel=sp,
                        zero_stage=zero,
                        recompute="none",
                    )
                    batch = config.training.full_batch_size or gpus
                    training = dataclasses.replace(config.training, micro_batch_size=micro, global_batch_size=batch)
                    layout = _valid(dataclasses.replace(config, parallel=parallel, training=training), gpus)
                    if layout is not None:
                        yield layout


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _schedules(config: Config, pp: int, kept: Collection[str]) -> list[tuple[str | None, int | None]]:
    """(schedule, stages per rank) to try on ``pp`` pipeline ranks; one rank has no use for any but 1F1B."""
    given = config.parallel
    of_schedule, of_stages = "parallel.pipeline_schedule" in kept, STAGES_OF_A_RANK & {*kept}
    if pp == 1:
        return [("1f1b", 1)] if given.num_layers_per_virtual_pipeline_stage is None else [(None, None)]
    if of_stages:
        return [(given.pipeline_schedule if of_schedule else None, given.virtual_pipeline_model_parallel_size)]
    names = (given.pipeline_schedule or "1f1b",) if of_schedule else SCHEDULES.names()
    blocks = len(blocks_of(config.model))
    return [(name, vpp) for name in names for vpp in SCHEDULES.get(name).searched if pp * vpp <= blocks]


def _valid(config: Config, gpus: int) -> PlannedLayout | None:
    """The layout that ``config`` describes, if it can train, with at least as many micro-batches as stages."""
    try:
        layout = layout_of(config, gpus)
        if layout.micro_batches < layout.pp:
            return None
        _ = _shortened(layout).schedule
    except UserError:
        return None
    return layout


def _shortened(layout: PlannedLayout) -> PlannedLayout:
    """The layout with so few micro-batches that its schedule is quick to walk, and as much memory in flight."""
    count = min(layout.micro_batches, ROUNDS * layout.pp * layout.vpp + layout.micro_batches % layout.pp)
    return dataclasses.replace(layout, global_batch_size=count * layout.micro_batch_size * layout.dp)


def step_seconds(
    parts: ModelParts, layout: PlannedLayout, stages: tuple[StagePart, ...], gpu: Gpu, efficiency: Efficiency
) -> float:
    """The step's time, from few micro-batches: every further one costs the busiest rank's work."""
    short = _shortened(layout)
    further = layout.micro_batches - short.micro_batches
    step = step_time(parts, short, stages, gpu, efficiency)
    return step.total + further * step.compute / short.micro_batches


def worst_rank(parts: ModelParts, layout: PlannedLayout, stages: tuple[StagePart, ...]) -> RankMemory:
    """The fullest pipeline rank."""
    ranks = (rank_memory(parts, layout, stages, rank) for rank in range(layout.pp))
    return max(ranks, key=lambda memory: memory.total)


def search(
    config: Config,
    gpus: int,
    gpu: Gpu,
    *,
    share: float = ROOM,
    count: int = 10,
    kept: Collection[str] = (),
    allowed: Callable[[PlannedLayout], bool] = lambda layout: True,
) -> list[Found]:
    """The ``count`` fastest layouts whose fullest rank needs at most ``share`` of the memory, fastest first.

    Of each layout the cheapest recomputation that fits is taken. Layouts are tried in the order of their
    :func:`_bound`, until none can be faster than what is found.

    Args:
        kept: see :func:`candidates`.
        allowed: whether a layout goes with the run's other settings.
    """
    again = (config.parallel.recompute,) if "parallel.recompute" in kept else RECOMPUTE
    parts, efficiency = model_parts(config.model, compute_dtype(config.training)), Efficiency()
    cut: dict[int, tuple[StagePart, ...]] = {}
    waiting: list[tuple[float, int, int, PlannedLayout, tuple[StagePart, ...]]] = []

    def wait(number: int, recompute: int, layout: PlannedLayout, stages: tuple[StagePart, ...]) -> None:
        layout = dataclasses.replace(layout, recompute=again[recompute])
        if not allowed(layout):
            return wait(number, recompute + 1, layout, stages) if recompute + 1 < len(again) else None
        bound = _bound(parts, layout, stages, gpu, efficiency)
        heapq.heappush(waiting, (bound, number, recompute, layout, stages))

    for number, layout in enumerate(candidates(config, gpus, gpu.node_size, kept)):
        layout = dataclasses.replace(layout, libraries=gpu.libraries)
        number_of_stages = layout.pp * layout.vpp
        stages = cut[number_of_stages] = cut.get(number_of_stages) or cut_stages(parts, layout)
        states = (rank_state(parts, _shortened(layout), stages, rank) for rank in {0, layout.pp - 1})
        if all(state.total + layout.libraries <= share * gpu.memory for state in states):
            wait(number, 0, layout, stages)
    best: list[tuple[float, int, PlannedLayout, tuple[StagePart, ...]]] = []
    while waiting:
        bound, number, recompute, layout, stages = heapq.heappop(waiting)
        if len(best) == count and bound >= best[-1][0]:
            break
        short, ranks = _shortened(layout), (0, *range(layout.pp - 1, 0, -1))  # the fullest are at the ends
        if all(least_memory(parts, short, stages, rank) <= share * gpu.memory for rank in ranks) and all(
            rank_memory(parts, short, stages, rank).total <= share * gpu.memory for rank in ranks
        ):
            seconds = step_seconds(parts, layout, stages, gpu, efficiency)
            best = heapq.nsmallest(count, [*best, (seconds, number, layout, stages)])
        elif recompute + 1 < len(again):
            wait(number, recompute + 1, layout, stages)
    return [
        Found(layout, worst_rank(parts, layout, stages), step_time(parts, layout, stages, gpu, efficiency))
        for _, _, layout, stages in best
    ]


def _bound(
    parts: ModelParts, layout: PlannedLayout, stages: tuple[StagePart, ...], gpu: Gpu, efficiency: Efficiency
) -> float:
    """A time that the step cannot beat: the busiest rank's work without any wait."""
    busy, placed = [0.0] * layout.pp, _shortened(layout).schedule
    for number, time in enumerate(stage_times(parts, layout, stages, gpu, efficiency)):
        busy[placed.rank_of(number)] += time.total * layout.micro_batches
    return max(busy)
