"""How long a step takes: a roofline of every stage, the pipeline schedule simulated with it, and what is not hidden."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.flops import matmul_elements
from megaforge.optim.optimizer import rule_of
from megaforge.parallel.pipeline.simulator import Costs, Timeline, simulate
from megaforge.planning.communication import bandwidth, gradient_traffic
from megaforge.planning.costs import crossing_bytes, end_cost, part_cost, stage_cost
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import DeclaredParameter, ModelParts, StagePart, stage_parameters
from megaforge.planning.state_bytes import state_bytes

FORWARD_PASSES = 3.0  # over kept activations: written, read by the next operation, and once for what is not kept
OPTIMIZER_PASSES = 2.0  # masters and moments are read and written


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on one stage; recomputation is part of ``backward_input``."""

    forward: float
    backward_input: float
    backward_weight: float

    @property
    def total(self) -> float:
        return self.forward + self.backward_input + self.backward_weight


@dataclass(frozen=True)
class StepTime:
    """A step's seconds and where they go.

    Attributes:
        compute: forward and backward passes of the busiest pipeline rank, their tp, cp and ep communication included.
        bubble: share of the pipeline's time in which the ranks wait, on average.
        pipeline: from the first forward to the last backward pass.
        reduction: gradient reduction and parameter gathering that nothing hides.
        optimizer: the update.
        mfu: model FLOPs (recomputation not counted) of the step / (seconds x peak of all GPUs).
    """

    compute: float
    bubble: float
    pipeline: float
    reduction: float
    optimizer: float
    mfu: float
    tokens_per_second: float

    @property
    def total(self) -> float:
        return self.pipeline + self.reduction + self.optimizer


def _product_seconds(
    held: Iterable[DeclaredParameter], cfg: ModelConfig, layout: PlannedLayout, gpu: Gpu, efficiency: Efficiency
) -> float:
    """Seconds that the products of a micro-batch's tokens with these matrices take."""
    seconds = 0.0
    for item in held:
        reached = efficiency.matmul if item.spec.expert_dim is None else efficiency.grouped_matmul
        shards = 1 if item.spec.shard_dim is None else layout.tp
        seconds += 2 * layout.tokens * matmul_elements([item.spec], cfg) / shards / (gpu.matmul * reached)
    return seconds


def layer_seconds(
    parts: ModelParts, layout: PlannedLayout, index: int, place: int, gpu: Gpu, efficiency: Efficiency
) -> tuple[float, float]:
    """Seconds of one micro-batch's forward pass in layer ``place`` of a block, without communication; and of the part
    of it that the backward pass computes again under ``--recompute``."""
    cfg, kind = parts.cfg, parts.blocks[index].kind.layers[place]
    products = _product_seconds(parts.blocks[index].held[place], cfg, layout, gpu, efficiency)
    layout = dataclasses.replace(layout, sequence_length=parts.blocks[index].kind.tokens(layout.sequence_length))
    mixing = kind.flops(cfg, layout.sequence_length) * layout.tokens / layout.tp
    speed: float | None = getattr(efficiency, kind.kernel, None)
    if speed is None:
        raise UserError(f"{kind.title}: its kernel '{kind.kernel}' is not a field of Efficiency (planning/gpus.py)")
    mixing /= gpu.matmul * speed
    moving = FORWARD_PASSES / (gpu.memory_bandwidth * efficiency.memory)
    plain = dataclasses.replace(layout, sequence_checkpoint=None)
    kept = part_cost(parts, plain, index, place).kept
    whole, again = products + mixing + moving * kept, 0.0
    if kind.recurrent and layout.sequence_checkpoint is not None and layout.cp == 1:
        again = mixing + moving * (kept - part_cost(parts, layout, index, place).kept)
    elif layout.recompute == "selective" and kind.is_mixer:
        again = mixing + moving * (kept - part_cost(parts, plain, index, place, "selective").kept)
    if layout.recompute in ("full", kind.recompute):
        again = whole + (again if kind.recurrent else 0.0)  # of what is computed again spans are, once more
    return whole, again


def stage_time(
    parts: ModelParts, layout: PlannedLayout, stage: StagePart, gpu: Gpu, efficiency: Efficiency
) -> StageTime:
    """The roofline of one micro-batch on a stage. The backward pass costs two forward passes, one of them for the
    weights, of which frozen ones have none. Communication over tp, cp, ep and etp is not hidden, nor is the way of
    activations to host memory and back (in either half of a backward pass)."""
    split, turns_back, layout = layout.splits_backward, layout.schedule.turns_back, layout.unsplit
    made = dataclasses.replace(layout, offload=False)  # what is computed is the same wherever it is kept
    compute = again = not_made = 0.0
    for index, count in parts.alike(stage.blocks).items():
        for place, held in enumerate(parts.blocks[index].held):
            whole, repeated = layer_seconds(parts, made, index, place, gpu, efficiency)
            frozen = [item for item in held if item.spec.frozen]
            not_made += count * _product_seconds(frozen, parts.cfg, layout, gpu, efficiency)
            compute, again = compute + count * whole, again + count * repeated
    moving = FORWARD_PASSES / (gpu.memory_bandwidth * efficiency.memory)
    ends = moving * sum(end_cost(parts, made, last=last).kept for last in stage.ends)
    if stage.last:
        ends += parts.head_flops(layout.sequence_length) * layout.tokens / layout.tp / (gpu.matmul * efficiency.matmul)
        if not turns_back or layout.dtype == torch.float16:
            again += ends  # the head computes its logits again
        elif parts.ahead:
            again += (
                parts.ahead_again(layout.sequence_length) * layout.tokens / layout.tp / (gpu.matmul * efficiency.matmul)
            )
    compute += ends
    cost = stage_cost(parts, layout, stage)
    speeds = {axis: bandwidth(layout, axis, gpu, efficiency) for axis in {*cost.forward, *cost.backward}}
    sent = {
        name: sum(size / speeds[axis] for axis, size in way.items())
        for name, way in (("forward", cost.forward), ("backward", cost.backward))
    }
    moved = cost.host / (gpu.host_bandwidth * efficiency.host)
    twice = moved if split else 0.0
    return StageTime(
        compute + sent["forward"] + moved, compute + again + sent["backward"] + moved, compute - not_made + twice
    )


def stage_times(
    parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], gpu: Gpu, efficiency: Efficiency
) -> list[StageTime]:
    """:func:`stage_time` of every stage; those of stages that are alike are computed once."""
    keys = [(tuple(parts.alike(stage.blocks).items()), stage.first, stage.last) for stage in stages]
    different = dict(zip(keys, stages, strict=True))
    times = {key: stage_time(parts, layout, stage, gpu, efficiency) for key, stage in different.items()}
    return [times[key] for key in keys]


def step_time(
    parts: ModelParts,
    layout: PlannedLayout,
    stages: Sequence[StagePart],
    gpu: Gpu,
    efficiency: Efficiency | None = None,
) -> StepTime:
    """The predicted step of ``layout``."""
    efficiency = efficiency or Efficiency()
    times = stage_times(parts, layout, stages, gpu, efficiency)
    timeline = pipeline_timeline(parts, layout, times, gpu, efficiency)
    reduction, optimizer = _step_end(parts, layout, stages, times, gpu, efficiency)
    ranks = range(layout.pp)
    total = timeline.makespan + reduction + optimizer
    tokens = layout.micro_batches * layout.dp * layout.rows * layout.sequence_length
    flops = parts.flops_per_token(layout.sequence_length) * tokens
    return StepTime(
        compute=max(timeline.busy(rank) for rank in ranks),
        bubble=timeline.bubble_share(),
        pipeline=timeline.makespan,
        reduction=reduction,
        optimizer=optimizer,
        mfu=flops / (total * gpu.matmul * layout.world_size),
        tokens_per_second=tokens / total,
    )


def pipeline_timeline(
    parts: ModelParts, layout: PlannedLayout, times: Sequence[StageTime], gpu: Gpu, efficiency: Efficiency
) -> Timeline:
    """The schedule with the stages' own times; the shares of forward, inputs and weights are the mean stage's."""
    mean = sum(time.total for time in times) / len(times)
    speed = bandwidth(layout, "pp", gpu, efficiency)
    scale = tuple(time.total / mean for time in times)
    costs = Costs(
        forward=sum(time.forward for time in times) / len(times),
        backward_input=sum(time.backward_input for time in times) / len(times),
        backward_weight=sum(time.backward_weight for time in times) / len(times),
        communication=0.0 if layout.pp == 1 else crossing_bytes(parts, layout.unsplit) / speed,
        stage_scale=scale,
    )
    return simulate(layout.schedule, costs)


def _step_end(
    parts: ModelParts,
    layout: PlannedLayout,
    stages: Sequence[StagePart],
    times: Sequence[StageTime],
    gpu: Gpu,
    efficiency: Efficiency,
) -> tuple[float, float]:
    """(reduction that nothing hides, update) in seconds, of the slowest pipeline rank. Overlapped, reduction hides
    behind the last micro-batch's backward pass and ZeRO's gathering behind the next forward pass."""
    speed = bandwidth(layout, "dp", gpu, efficiency)
    exposed = update = 0.0
    for rank in range(layout.pp):
        own = layout.schedule.stages_of(rank)
        held = stage_parameters(parts, [stages[stage] for stage in own])
        sent = gradient_traffic(held, layout)
        hidden_back = sum(times[stage].backward_input + times[stage].backward_weight for stage in own)
        hidden_front = sum(times[stage].forward for stage in own)
        hidden_back *= layout.micro_batches if layout.zero > 1 else 1
        if not layout.overlap:
            hidden_back = hidden_front = 0.0
        waiting = max(0.0, sent.reduced / speed - hidden_back) + max(0.0, sent.gathered / speed - hidden_front)
        state = state_bytes(parts, [stages[stage] for stage in own], layout)
        touched = OPTIMIZER_PASSES * state.optimizer + state.gradients + state.parameters
        touched += 2 * OPTIMIZER_PASSES * state.host  # buffers are filled and emptied, too
        exposed = max(exposed, waiting)
        products = _products(held, layout, rank) / (gpu.matmul * efficiency.grouped_matmul)
        # What lies in host memory comes while other parts leave and are updated.
        moving = state.host / (gpu.host_bandwidth * efficiency.host)
        update = max(update, moving, products + touched / (gpu.memory_bandwidth * efficiency.memory))
    return exposed, update


def _products(held: Sequence[tuple[DeclaredParameter, int]], layout: PlannedLayout, rank: int) -> float:
    """FLOPs of the update's matrix products (of orthogonalization, say) on pipeline rank ``rank``, all in 16 bit; under
    ZeRO replicas share them."""
    total, ctx = 0.0, layout.context(rank * layout.stage_ranks)
    for item, copies in held:
        if item.is_trained:
            sharers = ctx.axis(item.spec.replica_axis).size if layout.zero else 1
            rule = rule_of(layout.optimizer, item.spec)
            total += 2 * copies * rule.products(layout.optimizer, item.spec, ctx) / sharers
    return total
