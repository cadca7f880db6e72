"""``--memory-limit``: how full each rank's memory was, looked at every interval, and what would need less."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megaforge.device import memory_share
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

logger = logging.getLogger(__name__)

Advice = Callable[[], list[str]]
_NOTICED = 0.01  # a rise of the peak, as a share of the memory, that is worth another word


class MemoryLimit(Callback):
    """Measures every ``interval`` steps the fullest rank's peak, adds it to the step's numbers, and warns where it is
    above ``limit``, again once it has risen by a hundredth of the memory.

    Attributes:
        share: the greatest so far, of the memory that the rank may fill.
    """

    place = Place.BEFORE

    def __init__(self, limit: float, interval: int, advice: Advice | None = None) -> None:
        """``advice``: what would need less memory, each with what it saves; asked on rank 0 when there is need."""
        self.limit, self.interval, self.advice = limit, interval, advice
        self.share = 0.0
        self._ranks_here = 1
        self._told = limit

    def on_train_start(self, trainer: Trainer) -> None:
        host = os.uname().nodename
        self._ranks_here = Counter(exchange(trainer.ctx, host))[host]

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.iteration % self.interval:
            return
        self.share, rank = _fullest(trainer.ctx, memory_share(trainer.ctx.device, self._ranks_here))
        metrics.extra["memory_share"] = round(self.share, 4)
        if self.share <= self._told:
            return
        self._told = self.share + _NOTICED
        if trainer.ctx.is_first_rank:
            advice = self._ask()
            logger.warning("%s", self._words(rank, advice))
            trainer.events.tell("memory", share=round(self.share, 4), limit=self.limit, rank=rank, advice=advice)

    def _ask(self) -> list[str]:
        try:
            return [] if self.advice is None else self.advice()
        except Exception as error:  # a run does not end for want of advice
            logger.warning("no advice on memory: %s: %s", type(error).__name__, error)
            return []

    def _words(self, rank: int, advice: list[str]) -> str:
        text = f"the memory of rank {rank} was {self.share:.0%} full, above --memory-limit {self.limit:g}"
        return f"{text}; to need less a rank, by the plan: {'; '.join(advice)}" if advice else text


def _fullest(ctx: ParallelContext, share: float) -> tuple[float, int]:
    """The greatest ``share`` of any rank, and the rank. Collective."""
    if ctx.control is None:
        return share, 0
    shares = torch.zeros(ctx.world.size, dtype=torch.float64)
    shares[ctx.world.rank] = share
    dist.all_reduce(shares, group=ctx.control)
    return float(shares.max()), int(shares.argmax())
