"""Which ranks are slow: each one's own work in a step, compared with the others' every ``--log-interval``."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.device import Clock
from megaforge.monitor.wait_sampler import WaitSampler
from megaforge.parallel.agree import exchange
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    import torch

    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

_LEAST_LOOKS = 50  # fewer tell too little; then the next interval is taken in, too


class Load(NamedTuple):
    """What a rank's steps took since the last report, in seconds.

    Attributes:
        work: its own, the reading of batches included.
        wait: for others.
        looks: of the sampler; those of a GPU are as good as many.
        micro_batches: that it made.
    """

    host: str
    steps: int
    work: float
    wait: float
    looks: int
    micro_batches: int = 1


class Stragglers(Callback):
    """Tells of ranks that are slower than ``--straggler-factor`` times the median: when one becomes slow, and when it
    is not any more. All ranks measure for themselves, and exchange a line every ``--log-interval``.

    On a CPU a rank waits while it is in a collective or waits for one, by a sample of its time. On a GPU it waits, by
    the device's clock, from the end of its own micro-batches to the end of the gradients' reduction: what it waits for
    within (tp, cp, ep, pp) counts as work, so that a whole replica looks slow where one of its ranks is.

    Attributes:
        slow: the ranks that are, by how many times the median.
        new_sampler: makes what looks at the thread that trains.
    """

    place = Place.BEFORE

    def __init__(self, factor: float, interval: int) -> None:
        self.factor, self.interval = factor, interval
        self.slow: dict[int, float] = {}
        self.new_sampler: Callable[[], WaitSampler] = WaitSampler
        self._sampler: WaitSampler | None = None
        self._clock: Clock | None = None
        self._marks: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._begun: float | torch.cuda.Event = 0.0
        self._steps, self._seconds, self._within = 0, 0.0, 0.0
        self._since, self._taken = 0.0, 0

    @classmethod
    def of(cls, config: Config) -> Stragglers:
        return cls(config.resilience.straggler_factor, config.logging.log_interval)

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.ctx.world.size == 1:
            return
        if trainer.ctx.device.type == "cpu":
            self._sampler = self.new_sampler()
        else:
            self._clock = Clock(trainer.ctx.device)

    def on_step_start(self, trainer: Trainer) -> None:
        if self._sampler is not None:
            self._sampler.on, self._since = True, trainer.now()

    def on_backward(self, trainer: Trainer) -> None:
        if self._clock is not None:
            self._begun = self._clock.now()

    def on_gradients(self, trainer: Trainer) -> None:
        if self._clock is not None:
            self._marks.append((self._begun, self._clock.now()))

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._sampler is not None:
            self._sampler.on = False
            self._within += trainer.now() - self._since
        if trainer.ctx.world.size == 1:
            return
        self._steps, self._seconds = self._steps + 1, self._seconds + metrics.seconds
        self._taken += trainer.taken
        if metrics.iteration % self.interval == 0:
            loads = exchange(trainer.ctx, self._load())
            metrics.extra.update(self.report(trainer, loads))

    def on_train_end(self, trainer: Trainer) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def _load(self) -> Load:
        if self._sampler is not None:
            looks, waits = self._sampler.looks, self._sampler.waits
            wait = self._within * waits / max(looks, 1)
        else:
            looks, wait = _LEAST_LOOKS, sum(Clock.seconds(*marks) for marks in self._marks)
        return Load(socket.gethostname(), self._steps, self._seconds - wait, wait, looks, max(self._taken, 1))

    def _start_anew(self) -> None:
        if self._sampler is not None:
            self._sampler.take()
        self._marks.clear()
        self._steps, self._seconds, self._within = 0, 0.0, 0.0
        self._taken = 0

    def report(self, trainer: Trainer, loads: Sequence[Load]) -> dict[str, float]:
        """Tells of what changed, by the loads of all ranks, and gives the step's numbers; none where these tell too
        little so far."""
        if min(load.looks for load in loads) < _LEAST_LOOKS:
            return {}
        self._start_anew()
        each = statistics.fmean(load.micro_batches for load in loads)  # others than these with --balance-batch
        loads = [load._replace(work=load.work * each / load.micro_batches) for load in loads]
        median = max(statistics.median_low(load.work for load in loads), 1e-9)
        slow = {rank: load.work / median for rank, load in enumerate(loads) if load.work > self.factor * median}
        for rank in slow.keys() - self.slow.keys():
            self._tell(trainer, rank, loads, median)
        for rank in self.slow.keys() - slow.keys():
            print_rank_0(f"rank {rank} on {loads[rank].host} is as fast as the others again")
            trainer.events.tell("straggler", rank=rank, host=loads[rank].host, slow=False)
        self.slow = slow
        shares = [load.wait / max(load.work + load.wait, 1e-9) for load in loads]
        return {
            "slowest_rank": round(max(load.work for load in loads) / median, 3),
            "wait_share": round(statistics.fmean(shares), 4),
        }

    def _tell(self, trainer: Trainer, rank: int, loads: Sequence[Load], median: float) -> None:
        load, others = loads[rank], statistics.median_low(one.wait for place, one in enumerate(loads) if place != rank)
        factor, steps = load.work / median, load.steps
        print_rank_0(
            f"rank {rank} on {load.host} is slow: {factor:.1f} times the ranks' median of own work "
            f"({_ms(load.work / steps)} a step against {_ms(median / steps)}; it waits {_ms(load.wait / steps)} for "
            f"others, the others {_ms(others / steps)})"
        )
        seconds = {"work": load.work, "median": median, "wait": load.wait}
        each = {name: round(value / steps, 6) for name, value in seconds.items()}
        trainer.events.tell("straggler", rank=rank, host=load.host, slow=True, factor=round(factor, 3), **each)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
