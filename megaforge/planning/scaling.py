"""``tools/plan.py scaling``: how the same run goes on more and more GPUs, as the planner predicts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.config.config import Config
from megaforge.planning.gpus import Efficiency, Gpu, gpu_named
from megaforge.planning.layout import LIBRARIES, PlannedLayout, layout_of
from megaforge.planning.memory import RankMemory, rank_memory
from megaforge.planning.plan_request import parse_scaling
from megaforge.planning.report import assumptions, gigabytes
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.planning.table import table
from megaforge.planning.time import StepTime, step_time


@dataclass(frozen=True)
class Point:
    """A run on so many ranks, beside the same on the fewest.

    Attributes:
        memory: of the fullest rank.
        efficiency: tokens/s of a rank over those of a rank there.
    """

    layout: PlannedLayout
    memory: RankMemory
    time: StepTime
    efficiency: float

    @property
    def overhead(self) -> float:
        """Time of a step beyond what it would take at efficiency 1, as a share of that."""
        return 1 / self.efficiency - 1


def at_ranks(config: Config, ranks: int, first: int, *, weak: bool) -> Config:
    """``config`` as it is on ``ranks``, where its global batch is the one on ``first`` ranks; with ``weak`` the batch
    grows as the ranks do, which leaves whole sequences.

    Raises:
        UserError: the layout is impossible on the ``first``.
    """
    batch = layout_of(config, first).global_batch_size
    size = batch * ranks // first if weak else batch
    training = dataclasses.replace(
        config.training, global_batch_size=size, rampup_batch_size=(), step_batch_size_schedule=()
    )
    return dataclasses.replace(config, training=training)


def scaling_curve(
    config: Config,
    sizes: Sequence[int],
    gpu: Gpu,
    *,
    weak: bool,
    efficiency: Efficiency | None = None,
    libraries: float = LIBRARIES,
    device_type: str = "meta",
) -> list[Point]:
    """The plans of ``config``, whose layout but for dp is fixed, on each of ``sizes`` ranks, fewest first.

    Args:
        libraries: bytes that a rank needs besides.
        device_type: whose kernels keep what they keep.

    Raises:
        UserError: the layout is impossible on one of them.
    """
    points: list[Point] = []
    for ranks in sizes:
        layout = layout_of(at_ranks(config, ranks, sizes[0], weak=weak), ranks)
        layout = dataclasses.replace(layout, device_type=device_type)
        parts = model_parts(config.model, layout.dtype)
        stages = cut_stages(parts, layout)
        time = step_time(parts, layout, stages, gpu, efficiency)
        memories = [rank_memory(parts, layout, stages, rank, libraries) for rank in range(layout.pp)]
        each = time.tokens_per_second / ranks
        first = points[0].time.tokens_per_second / sizes[0] if points else each
        points.append(Point(layout, max(memories, key=lambda memory: memory.total), time, each / first))
    return points


def curve_rows(points: Sequence[Point], gpu: Gpu) -> list[tuple[str, ...]]:
    """A row a point."""
    rows: list[tuple[str, ...]] = [
        *[("GPUs", "dp", "batch", "micro-batches", "step s", "tokens/s", "efficiency", "overhead", "bubble")]
    ]
    rows[0] += ("reduction s", "GB a GPU", "of GPU", "MFU")
    for point in points:
        layout, time, total = point.layout, point.time, point.memory.total
        counts = (layout.world_size, layout.dp, layout.global_batch_size, layout.micro_batches)
        rows.append(
            (*(f"{count:,}" for count in counts), f"{time.total:.3f}", f"{time.tokens_per_second:,.0f}")
            + (f"{point.efficiency:.1%}", f"{point.overhead:.1%}", f"{time.bubble:.1%}", f"{time.reduction:.3f}")
            + (gigabytes(total), f"{total / gpu.memory:.0%}", f"{time.mfu:.1%}")
        )
    return rows


def scaling_text(config: Config, sizes: Sequence[int], gpu: Gpu, *, weak: bool) -> str:
    """The curve in words, without what it assumes."""
    points = scaling_curve(config, sizes, gpu, weak=weak)
    batch = "grows as the GPUs do" if weak else "stays the same"
    head = f"{config.name} on {gpu.name}: {points[0].layout.describe()}, sequence length "
    head += f"{points[0].layout.sequence_length}; {'weak' if weak else 'strong'} scaling: the global batch {batch}"
    return "\n".join([head, "", table(curve_rows(points, gpu))])


def run(arguments: Sequence[str], prog: str = "plan.py scaling") -> None:
    """Prints the curve, and what it assumes.

    Raises:
        UserError: as training would, at any of the sizes.
    """
    request = parse_scaling(arguments, prog)
    for note in request.notes:
        print(note)
    own, gpu = request.own, gpu_named(request.own.gpu)
    print(scaling_text(request.config, own.gpus, gpu, weak=own.weak))
    print(f"\n{assumptions(gpu)}")
