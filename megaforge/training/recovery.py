"""What a step does about a gradient that it cannot use, instead of ending the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from megaforge.config.launcher import print_rank_0
from megaforge.errors import UserError
from megaforge.training.replay_file import write_replay

if TYPE_CHECKING:
    from megaforge.training.batch_sums import BatchSums
    from megaforge.training.trainer import Trainer


class NonFiniteError(UserError):
    """The run ends, as its gradients are not finite. ``alert``: what is raised then besides the failure."""

    alert = "nan"


class Gradients(NamedTuple):
    """What a step has computed before its update: every rank has the same numbers.

    Attributes:
        norm: of the gradient before clipping; inf or nan where it overflowed.
        extra: what there is to record besides.
    """

    sums: BatchSums
    norm: float
    extra: dict[str, float]


class LeavingOut:
    """``--skip-nonfinite-steps N``: a step whose gradient is not finite leaves the weights and the optimizer's state as
    they are, to the bit, and the run goes on with the next batch; more than N such steps in a row end it, or with
    ``--spike-rollback`` take it back.

    Iteration, schedules and samples go on as after any step; averages of weights and what modules learn from a batch
    (router biases, ranges) do not. Steps that a lower loss scale answers (``--fp16``) are not counted.

    Attributes:
        in_a_row: steps left out since the last update.
        total: steps left out, from the run's beginning.
    """

    def __init__(self, most: int) -> None:
        self.most, self.in_a_row, self.total = most, 0, 0

    def judge(self, trainer: Trainer, found: Gradients) -> None:
        """Takes in the gradient of the step that comes.

        Raises:
            NonFiniteError: it is not finite, as were too many before; the same on every rank.
        """
        if math.isfinite(found.norm):
            self.in_a_row = 0
            return
        if trainer.scaler.can_fall:
            return
        iteration = trainer.iteration + 1
        if self.in_a_row >= self.most:
            if trainer.rollback is None:
                raise NonFiniteError(self._end(iteration, found.norm, trainer.config.optimizer.lr))
            trainer.rollback.asked = f"the gradient norm is {found.norm}"
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        first = trainer.consumed_samples
        samples = range(first, first + round(float(found.sums.counts["sequences"])))
        values = {"loss": found.sums.means()["loss"], "grad_norm": found.norm}
        file = write_replay(trainer, iteration, samples, "its gradient is not finite", **values)
        trainer.events.tell(
            "skip",
            step=iteration,
            reason="gradient",
            samples=[samples.start, samples.stop],
            in_a_row=self.in_a_row,
            replay=file,
            loss=str(values["loss"]),
            grad_norm=str(found.norm),
        )
        print_rank_0(
            f"iteration {iteration}: the gradient norm is {found.norm}: the step is left out "
            f"({self.in_a_row} in a row of at most {self.most})" + (f"; its batch is in {file}" if file else "")
        )

    def _end(self, iteration: int, norm: float, lr: float) -> str:
        before = f", after {self.in_a_row} steps in a row that were left out" if self.in_a_row else ""
        text = (
            f"iteration {iteration}: the gradient norm is {norm}{before}, so the run ends before it can harm the "
            f"weights; --load the last checkpoint with a lower --lr than {lr}, or start anew with a longer "
            "--lr-warmup-iters"
        )
        return text if self.most else f"{text}; --skip-nonfinite-steps N leaves up to N such steps in a row out"

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])
