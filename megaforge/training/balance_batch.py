"""``--balance-batch``: data-parallel ranks that are slower take fewer micro-batches of the same global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megaforge.config.balancing import alike_ranks
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.data.dealing import Dealing
from megaforge.device import Clock
from megaforge.parallel.agree import exchange
from megaforge.registry import SCHEDULES
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    import torch

    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

_WORTH = 0.95  # of the slowest rank's time, which another dealing must come below
_NAMED = 16  # numbers that a line has


class BalanceBatch(Callback):
    """Measures what a micro-batch takes on each dp rank, from the step's start to the end of its own backward passes,
    and deals them out anew every ``interval`` steps where the slowest rank would gain 5 %.

    The global batch has the same samples, each counted once, and means are over all of them: only the order of sums
    changes. Ranks of one replica (tp, cp, pp) count as their slowest; dp ranks that share experts take as many.
    """

    place = Place.BEFORE
    state_name = "balance_batch"
    _saved: Sequence[float] | None = None

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.dealing: Dealing | None = None
        self._clock: Clock | None = None
        self._begun: float | torch.cuda.Event = 0.0
        self._marks: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._micro_batches = 0

    @classmethod
    def of(cls, config: Config) -> BalanceBatch | None:
        """What the flags ask for."""
        return cls(config.logging.log_interval) if config.resilience.balance_batch else None

    def on_train_start(self, trainer: Trainer) -> None:
        ctx, plan = trainer.ctx, trainer.engine.plan
        if ctx.dp.size == 1:
            return
        unit = plan.pp if SCHEDULES.get(plan.name).whole_rounds else 1
        span = alike_ranks(ctx.tp.size * ctx.cp.size, ctx.ep.size, ctx.etp.size)
        self.dealing = trainer.dealing = Dealing(ctx.dp.size, span, unit)
        self._clock = Clock(ctx.device)
        if self._saved is not None and len(self._saved) == len(self.dealing.speeds):
            self.dealing.speeds = tuple(self._saved)

    def on_step_start(self, trainer: Trainer) -> None:
        if self._clock is not None:
            self._begun = self._clock.now()

    def on_backward(self, trainer: Trainer) -> None:
        if self._clock is not None:
            self._marks.append((self._begun, self._clock.now()))
            self._micro_batches += trainer.taken

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.dealing is not None and metrics.iteration % self.interval == 0 and self._marks:
            spent = sum(Clock.seconds(*marks) for marks in self._marks) / self._micro_batches
            each = exchange(trainer.ctx, (trainer.ctx.dp.rank, max(spent, 1e-9)))
            self._marks.clear()
            self._micro_batches = 0
            self.deal(trainer, self.dealing, each)

    def deal(self, trainer: Trainer, dealing: Dealing, each: Sequence[tuple[int, float]]) -> None:
        """Deals out anew, if that is worth it.

        Args:
            each: of every rank its dp rank, and the seconds that a micro-batch took there.
        """
        slowest = [0.0] * len(dealing.speeds)
        for rank, seconds in each:
            slowest[rank // dealing.span] = max(slowest[rank // dealing.span], seconds)
        speeds = [1 / seconds for seconds in slowest]
        count = trainer.last_batch // trainer.config.training.micro_batch_size
        now, new = dealing.counts(count), dealing.counts(count, speeds)
        took, would = (
            max(number * slowest[rank // dealing.span] for rank, number in enumerate(counts)) for counts in (now, new)
        )
        if would > _WORTH * took:
            return
        dealing.speeds = tuple(speeds)
        print_rank_0(
            f"--balance-batch: micro-batches of the data-parallel ranks {_list(now)} become {_list(new)}; the slowest "
            f"took {1000 * took:.1f} ms for its own, and will take about {1000 * would:.1f} ms"
        )
        trainer.events.tell("balance", micro_batches=new, seconds=round(took, 6), expected=round(would, 6))

    def state(self) -> dict[str, Any]:
        return {"speeds": None if self.dealing is None else list(self.dealing.speeds)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Speeds hold for as many dp ranks; others are measured anew."""
        self._saved = state["speeds"]


def _list(counts: Sequence[int]) -> str:
    if len(counts) <= _NAMED:
        return ", ".join(map(str, counts))
    return f"{min(counts)} to {max(counts)}"
