"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from megaforge.planning.communication import TRAFFIC_AXES, step_traffic
from megaforge.planning.gpus import Efficiency, Gpu, verdict
from megaforge.planning.layout import LIBRARIES, PlannedLayout
from megaforge.planning.memory import RankMemory, rank_memory
from megaforge.planning.round_time import RoundTime, round_time
from megaforge.planning.search import Found
from megaforge.planning.stages import ModelParts, cut_stages
from megaforge.planning.table import table
from megaforge.planning.time import StepTime, step_time


def gigabytes(size: float) -> str:
    """Decimal gigabytes, as GPUs are sold."""
    return f"{size / 1e9:.2f}"


def memory_table(memories: Sequence[RankMemory], gpu: Gpu) -> str:
    """One row a pipeline rank, in GB."""
    rows: list[tuple[str, ...]] = [
        ("pp rank", "blocks", "elements", "parameters", "gradients", "optimizer", "in flight", "activations", "buffers")
        + ("total GB", "of GPU")
    ]
    for memory in memories:
        state = memory.state
        blocks = " ".join(f"{stage.blocks.start}-{stage.blocks.stop - 1}" for stage in memory.stages)
        sizes = (state.parameters, state.gradients, state.optimizer)
        rows.append(
            (f"{memory.rank}", blocks, f"{state.elements:,}", *map(gigabytes, sizes), f"{memory.in_flight}")
            + (gigabytes(memory.activations), gigabytes(memory.buffers), gigabytes(memory.total))
            + (f"{memory.total / gpu.memory:.1%}",)
        )
    return table(rows)


def _in_host_memory(memories: Sequence[RankMemory]) -> list[str]:
    state, activations = max(m.state.host for m in memories), max(m.host for m in memories)
    lines = [f"optimizer state in host memory: {gigabytes(state)} GB a rank"] if state else []
    return lines + [f"activations in host memory: {gigabytes(activations)} GB a rank"] * bool(activations)


def plan_text(parts: ModelParts, layout: PlannedLayout, gpu: Gpu, name: str) -> str:
    """Everything about one layout: memory, communication, bubble, time, and what they assume."""
    stages = cut_stages(parts, layout)
    memories = [rank_memory(parts, layout, stages, rank) for rank in range(layout.pp)]
    traffic = [step_traffic(parts, layout, stages, rank) for rank in range(layout.pp)]
    axes = [axis for axis in TRAFFIC_AXES if any(float(gigabytes(sent[axis])) for sent in traffic)]
    sent_rows = [("pp rank", *axes)]
    sent_rows += [(f"{rank}", *(gigabytes(sent[axis]) for axis in axes)) for rank, sent in enumerate(traffic)]
    time = step_time(parts, layout, stages, gpu)
    fullest = max(memory.total for memory in memories) / gpu.memory
    lines = [
        f"{name} on {layout.world_size} x {gpu.name}: {layout.describe()} (dp {layout.dp})",
        f"sequence length {layout.sequence_length}, global batch {layout.global_batch_size} sequences, "
        f"{layout.micro_batches} micro-batches of {layout.micro_batch_size} on a rank",
        "",
        memory_table(memories, gpu),
        *_in_host_memory(memories),
        *([f"the teacher's weights, in the total: {gigabytes(memories[0].teacher)} GB a rank"] * bool(layout.teacher)),
        f"fullest rank: {fullest:.1%} of {gpu.memory / 1e9:g} GB: {verdict(fullest)}",
        "",
        "GB that a rank sends in a step, by axis:" if axes else "no communication",
        table(sent_rows) if axes else "",
        "",
        time_text(time),
        *_rounds(layout, memories, round_time(parts, layout, stages, gpu), time),
        "",
        assumptions(gpu),
    ]
    return "\n".join(lines)


def _rounds(
    layout: PlannedLayout, memories: Sequence[RankMemory], taken: RoundTime | None, time: StepTime
) -> list[str]:
    rounds = layout.rounds
    if rounds is None or taken is None:
        return []
    fullest = max(memories, key=lambda memory: memory.making)
    each = f"every {rounds.epochs} steps" if rounds.epochs > 1 else "each step"
    beside = [(taken.scored + taken.reference + one) / rounds.epochs for one in (taken.least, taken.most)]
    low, high = (time.total + one for one in beside)
    kept = ", ".join(f"{gigabytes(size)} GB of {what}" for what, size in fullest.made.items())
    return [
        "",
        rounds.described(layout),
        f"{rounds.doing}: {gigabytes(fullest.making)} GB a rank at most, libraries included, while there are no "
        f"activations; {kept} in host memory",
        f"before {each}: {rounds.doing} {taken.least:.2f} to {taken.most:.2f} s ({rounds.between()}), "
        f"old probabilities {taken.scored:.2f} s, "
        + (f"reference {taken.reference:.2f} s" if rounds.has_reference else rounds.without),
        f"predicted step with its {rounds.doing} {low:.2f} to {high:.2f} s",
    ]


def time_text(time: StepTime) -> str:
    """A step's prediction in words."""
    return (
        f"predicted step {time.total:.2f} s: pipeline {time.pipeline:.2f} s (busiest rank computes "
        f"{time.compute:.2f} s, bubble {time.bubble:.1%}), exposed reduction {time.reduction:.2f} s, "
        f"update {time.optimizer:.2f} s\n"
        f"predicted {time.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.1%}"
    )


def assumptions(gpu: Gpu, efficiency: Efficiency | None = None) -> str:
    """What the prediction of time rests on."""
    reached = efficiency or Efficiency()
    return (
        f"assumed: {gpu.name} with {gpu.matmul / 1e12:g} TFLOP/s, {gpu.memory_bandwidth / 1e12:g} TB/s, "
        f"{gpu.node_bandwidth / 1e9:g} GB/s in the server ({gpu.node_size} GPUs) and {gpu.network_bandwidth / 1e9:g} "
        f"GB/s out of it, {gpu.host_bandwidth / 1e9:g} GB/s to host memory, one direction; reached: dense products "
        f"{reached.matmul:.0%}, experts {reached.grouped_matmul:.0%}, attention {reached.attention:.0%}, WKV "
        f"{reached.wkv:.1%}, memory {reached.memory:.0%}, server {reached.node:.0%}, network {reached.network:.0%}, "
        f"host memory {reached.host:.0%}; tp, cp, ep and etp communication is not hidden, gradient reduction is hidden "
        f"behind one backward pass; tokens spread evenly over experts; {LIBRARIES / 1e9:g} GB for CUDA, cuBLAS and "
        "NCCL; parameters, gradients and optimizer are exact"
    )


def search_text(found: Sequence[Found], gpu: Gpu, name: str, gpus: int, share: float) -> str:
    """The layouts found, fastest first."""
    if not found:
        return f"{name}: no layout on {gpus} x {gpu.name} stays within {share:.0%} of {gpu.memory / 1e9:g} GB"
    rows = [("layout", "dp", "GB", "of GPU", "bubble", "step s", "tokens/s", "MFU")]
    rows += [
        (
            item.layout.describe(),
            f"{item.layout.dp}",
            gigabytes(item.memory.total),
            f"{item.memory.total / gpu.memory:.0%}",
            f"{item.time.bubble:.1%}",
            f"{item.time.total:.2f}",
            f"{item.time.tokens_per_second:,.0f}",
            f"{item.time.mfu:.1%}",
        )
        for item in found
    ]
    first = found[0].layout
    head = f"{name} on {gpus} x {gpu.name}, sequence length {first.sequence_length}, global batch "
    head += f"{first.global_batch_size}: fastest layouts within {share:.0%} of {gpu.memory / 1e9:g} GB"
    return "\n".join([head, "", table(rows), "", assumptions(gpu)])
