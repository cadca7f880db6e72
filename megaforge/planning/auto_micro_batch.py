"""``--micro-batch-size auto``: as many sequences at once as have room, by the planner. The global batch, and so what
is learned, stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.planning.auto_layout import AutoLayout, Decision
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.layout import layout_of
from megaforge.planning.machine import Stand
from megaforge.planning.search import step_seconds, worst_rank
from megaforge.planning.stages import cut_stages, model_parts

FLAG = "--micro-batch-size auto"
AS_SHORT = 1.02  # predictions are not finer


class AutoMicroBatch(AutoLayout):
    """Chooses once, as :class:`megaforge.planning.auto_layout.AutoLayout`; the layout is as it was given."""

    flag = FLAG

    def __init__(self, origins: Mapping[str, str] | None = None) -> None:
        # --machine has served once there is a number.
        super().__init__((), None if origins is None else {**origins, "parallel.machine": "default"})

    def _decide(self, config: Config, stands: list[Stand]) -> Decision:
        gpu, notes = self._device(config, stands)
        size, why = choose_micro_batch(config, len(stands), gpu, self._fits)
        return {"values": {"training.micro_batch_size": size}, "notes": notes, "why": why}


def choose_micro_batch(
    config: Config, world_size: int, gpu: Gpu, fits: Callable[[Config], bool] = lambda config: True
) -> tuple[int, str]:
    """The largest micro-batch size, of powers of two, that has room within ``--memory-limit`` and leaves the predicted
    step as short as any other does, to :data:`AS_SHORT`: a pipeline needs several to be busy. And a line that says so.

    Args:
        fits: whether a size goes with the run's other settings.

    Raises:
        UserError: the layout is impossible with one sequence at once, or that has no room.
    """
    share, parts = config.parallel.memory_limit, None
    tried: list[tuple[float, int, float]] = []
    size = 1
    while True:
        one = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_size=size))
        try:
            layout = dataclasses.replace(layout_of(one, world_size), libraries=gpu.libraries)
        except UserError:
            if size == 1:
                raise
            break  # the global batch has no more for each rank
        parts = parts or model_parts(config.model, layout.dtype)
        stages = cut_stages(parts, layout)
        needed = worst_rank(parts, layout, stages).total
        if needed > share * gpu.memory or (size > 1 and not fits(one)):
            break
        tried.append((step_seconds(parts, layout, stages, gpu, Efficiency()), size, needed))
        size *= 2
    room = f"{share:.0%} of {gpu.memory / 1e9:.3g} GB"
    if not tried:
        raise UserError(
            f"{FLAG}: the fullest of {world_size} x {gpu.name} needs {needed / 1e9:.3g} GB for one sequence at once, "
            f"and {room} is what there is; give --recompute full, another layout, or --layout auto, which looks for one"
        )
    shortest = min(tried)[0]
    step, size, needed = max((one for one in tried if one[0] <= AS_SHORT * shortest), key=lambda one: one[1])
    sizes = ", ".join(str(one) for _, one, _ in tried)
    return size, (
        f"{FLAG}: {size}, of {sizes} that have room in {room} on {world_size} x {gpu.name}, by the predicted step of "
        f"{step:.3g} s; its fullest rank needs {needed / 1e9:.3g} GB ({needed / gpu.memory:.0%})"
    )
