"""``--spike-rollback``: back to a copy of the run's state from before a spike, and on without the batches since."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaforge.checkpoint.directory import abandon_later
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.data.skip_list import add_skip, read_skips, set_skips_aside
from megaforge.data.skipped import Stretch
from megaforge.errors import UserError
from megaforge.monitor.spikes import RecentSteps
from megaforge.parallel.agree import from_first_rank
from megaforge.training.callbacks import Callback, Place
from megaforge.training.checkpointing import loads_own_checkpoints
from megaforge.training.replay_file import write_replay
from megaforge.training.state_copy import StateCopy

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

MOST = 3  # times that a run goes back to one iteration


class SpikeRollback(Callback):
    """After a spike of the loss or of the gradient's norm (:func:`megaforge.monitor.spikes.is_spike`) the run
    goes back to a copy of its state in host memory, and leaves out the batches between there and the spike, its own
    included, and ``beyond`` more (PaLM, Chowdhery et al., arXiv 2204.02311, section 5.1).

    Copies are taken every ``every`` steps; two are kept, and the run goes back to the newest that is at least half
    that old: a spike begins before it is seen. What is left out is told in ``skipped.jsonl`` before the run goes on,
    and kept in checkpoints; checkpoints from after the copy are set aside. So a run that is started again, at any
    layout, leaves out the same samples.

    Attributes:
        asked: why the run is to go back after this step, whatever its numbers; None: only where they spike.
        last: the alert (:data:`megaforge.registry.ALERTS`) that it last went back for, and why.
    """

    place = Place.AFTER
    state_name = "spike_rollback"

    def __init__(self, every: int, beyond: int, window: int) -> None:
        self.every, self.beyond, self.recent = every, beyond, RecentSteps(window)
        self.asked: str | None = None
        self.last: tuple[str, str] | None = None
        self._copies: list[StateCopy] = []  # the oldest first
        self._went_back: Counter[int] = Counter()

    @classmethod
    def of(cls, config: Config) -> SpikeRollback | None:
        """What the flags ask for."""
        flags = config.resilience
        return cls(flags.spike_rollback, flags.spike_skip_batches, flags.spike_window) if flags.spike_rollback else None

    def on_train_start(self, trainer: Trainer) -> None:
        trainer.rollback = self
        self._copy(trainer)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.iteration % self.every == 0 and not trainer.finished:
            self._copy(trainer)

    def _copy(self, trainer: Trainer) -> None:
        spare = self._copies.pop(0) if len(self._copies) == 2 else StateCopy()
        spare.take(trainer)
        self._copies.append(spare)

    def goes_back(self, trainer: Trainer, metrics: StepMetrics) -> bool:
        """Whether the step that was just made is undone: then the run stands where the copy was taken. Collective.

        Raises:
            UserError: it has gone back there too often, or what it leaves out cannot be written down.
        """
        alert = "nan" if self.asked else "loss_spike"
        reason, self.asked = self.asked or self._reason(metrics), None
        if reason is None:
            return False
        self.last = alert, f"iteration {metrics.iteration}: {reason}"
        half = metrics.iteration - 1 - self.every // 2
        chosen = next((copy for copy in reversed(self._copies) if copy.iteration <= half), self._copies[0])
        self._went_back[chosen.iteration] += 1
        if self._went_back[chosen.iteration] > MOST:
            raise UserError(
                f"iteration {metrics.iteration}: {reason}, and the run has gone back to iteration {chosen.iteration} "
                f"{MOST} times already; --load an earlier checkpoint with a lower --lr, or leave out more with "
                f"--spike-skip-batches than {self.beyond}"
            )
        self._undo(trainer, metrics, chosen, reason)
        return True

    def _reason(self, metrics: StepMetrics) -> str | None:
        """Why this step is one to undo; otherwise its numbers tell what is usual."""
        values = {"loss": metrics.loss, "grad_norm": metrics.grad_norm}
        if not all(map(math.isfinite, values.values())):
            return None
        return self.recent.suspicion(values)

    def _undo(self, trainer: Trainer, metrics: StepMetrics, copy: StateCopy, reason: str) -> None:
        step, end = metrics.iteration, trainer.consumed_samples
        samples = range(end - round(trainer.last_batch), end)
        numbers = {"loss": metrics.loss, "grad_norm": metrics.grad_norm}
        replay = write_replay(trainer, step, samples, reason, **numbers)
        stop = trainer.data.read_before(trainer.batches.samples_after(self.beyond, end))
        left_out = trainer.data.read_before(copy.consumed_samples), stop
        trainer.settle_save()
        copy.restore(trainer)
        self._copies = [kept for kept in self._copies if kept.iteration <= copy.iteration]
        trainer.went_back()  # before it is written down: what is kept elsewhere of the steps undone is gone then
        aside = from_first_rank(trainer.ctx, lambda: _write_down(trainer, left_out, step, reason))
        trainer.data.leave_out([left_out])
        trainer.events.tell(
            "rollback", step=step, reason=reason, to=copy.iteration, skipped=list(left_out), aside=aside, replay=replay
        )
        print_rank_0(
            f"iteration {step}: {reason}: the run goes back to iteration {copy.iteration} and leaves out samples "
            f"{left_out[0]} to {left_out[1] - 1}" + (f"; set aside: {', '.join(aside)}" if aside else "")
        )

    def state(self) -> dict[str, Any]:
        return {"seen": self.recent.seen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.recent.load(state["seen"])


def _write_down(trainer: Trainer, left_out: Stretch, step: int, reason: str) -> list[str]:
    """Sets aside checkpoints from after where the run stands, then tells what it leaves out: whoever starts it again
    finds either nothing of this or all.

    Returns:
        What was set aside.
    """
    if trainer.config.checkpoint.save is None:
        return []
    run = Path(trainer.config.checkpoint.save)
    try:
        aside = abandon_later(run, trainer.iteration)
        add_skip(run, left_out, after=trainer.iteration, step=step, reason=reason)
    except OSError as error:
        raise UserError(
            f"--save {run}: what the run leaves out after a spike cannot be written there ({error.strerror})"
        ) from error
    return [path.name for path in aside]


def follow_skips(trainer: Trainer) -> None:
    """Has a run that was started leave out what it left out before, from where it goes on. Collective.

    Raises:
        UserError: on every rank: ``skipped.jsonl`` cannot be read.
    """
    flags, data = trainer.config.checkpoint, trainer.data
    own = loads_own_checkpoints(flags)
    goes_on = trainer.iteration > 0 and trainer.saved_iteration == trainer.iteration
    anew = trainer.consumed_samples == 0 and trainer.earlier["samples"] > 0  # --reset-data: other numbers
    if flags.load is not None and (goes_on or own) and not anew:
        load = Path(flags.load)
        told = from_first_rank(trainer.ctx, lambda: [*read_skips(load), *read_skips(load.parent)])
        here = data.read_before(trainer.consumed_samples)
        data.leave_out(stretch for stretch in told if stretch[0] >= here)
    elif flags.save is not None:
        run = Path(flags.save)
        aside = from_first_rank(trainer.ctx, lambda: set_skips_aside(run))
        if aside is not None:
            print_rank_0(f"--save {run}: another run's list of skipped samples was renamed to {aside.name}")
    if data.stretches:
        told = [(first, stop - 1) for first, stop in data.stretches]
        print_rank_0(f"samples that the run leaves out: {', '.join(f'{a} to {b}' for a, b in told)}")
