"""What goes on from step to step of a policy's training: the divergence's weight, what is done when it grows too far,
and what several steps learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from megaforge.config.launcher import print_rank_0
from megaforge.data.loader import Batch
from megaforge.errors import UserError
from megaforge.parallel.agree import reduced
from megaforge.reasoning.packing import samples_of
from megaforge.reasoning.policy_losses import adapted
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

LOWEST, REGROWTH = 1 / 16, 1.1  # of the learning rate's factor: the least, and what it grows by a step


class Kept(Protocol):
    """What was done, and what it is worth."""

    def state(self) -> Any:
        """JSON."""


class PolicyControl(Callback):
    """
    Attributes:
        coefficient: weight of the divergence from the reference.
        kept: what is learnt from in the present round, by their numbers, and the first one's number; of the whole
            global batch where several steps learn from it, otherwise of this rank.
        round_: the iteration before its first step.
    """

    place = Place.BEFORE
    state_name = "policy_control"

    def __init__(self, trainer: Trainer) -> None:
        self.flags = trainer.config.rl
        self.coefficient = self.flags.rl_kl
        self.kept: dict[int, Any] = {}
        self.first = self.round_ = 0
        self._factor = 1.0

    def kept_of(self, state: Any) -> Kept:
        """The opposite of :meth:`Kept.state`."""
        raise NotImplementedError

    def due(self, iteration: int) -> bool:
        """Whether the step behind ``iteration`` begins a round."""
        return not self.kept or iteration >= self.round_ + self.flags.rl_epochs

    def round_for(
        self, trainer: Trainer, batches: Sequence[Batch], play: Callable[[], tuple[dict[int, Any], list[Batch]]]
    ) -> tuple[list[list[Any]], list[Batch] | None]:
        """What each of this step's micro-batches learns from. Collective.

        Args:
            batches: that were read, whose samples say which.
            play: begins a round: what is :attr:`kept`, and the micro-batches of this rank's.

        Returns:
            What was kept of the samples of each micro-batch; and the micro-batches where the round is new.
        """
        samples = [samples_of(batch) for batch in batches]
        first = reduced(trainer.ctx, min(map(min, samples)), dist.ReduceOp.MIN)
        made: list[Batch] | None = None
        if self.due(trainer.iteration):
            self.first, self.round_ = first, trainer.iteration
            self.kept, made = play()
        return [[self.kept[sample - first + self.first] for sample in own] for own in samples], made

    def on_numbers(self, trainer: Trainer, metrics: StepMetrics) -> None:
        kl, most = metrics.extra.get("kl"), self.flags.rl_kl_collapse
        if kl is not None and most is not None and kl > most:
            self._collapse(trainer, metrics.iteration, kl)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        kl = metrics.extra.get("kl")
        if kl is None:  # there is no reference
            return
        metrics.extra["kl_coefficient"] = self.coefficient
        if self.flags.rl_kl_target is not None:
            self.coefficient = adapted(self.coefficient, kl, self.flags.rl_kl_target, self.flags.rl_kl_horizon)
        if self.flags.rl_kl_limit is not None:
            self._hold(trainer, metrics, kl, self.flags.rl_kl_limit)

    def _hold(self, trainer: Trainer, metrics: StepMetrics, kl: float, limit: float) -> None:
        metrics.extra["policy_lr_factor"] = self._factor
        if kl > limit and self._factor > LOWEST:
            self._factor = max(self._factor / 2, LOWEST)
            print_rank_0(
                f"iteration {metrics.iteration}: the policy's divergence from the first is {kl:.4g}, above "
                f"--rl-kl-limit {limit:g}: the learning rate is multiplied by {self._factor:g}"
            )
        elif kl <= limit:
            self._factor = min(self._factor * REGROWTH, 1.0)
        trainer.lr_factors["policy"] = self._factor

    def _collapse(self, trainer: Trainer, iteration: int, kl: float) -> None:
        limit = f"--rl-kl-collapse {self.flags.rl_kl_collapse:g}"
        text = f"the policy's divergence from the first is {kl:.4g}, above {limit}"
        if trainer.rollback is None:
            raise UserError(
                f"iteration {iteration}: {text}: the policy has collapsed; go on from an earlier checkpoint with a "
                "lower --lr or a higher --rl-kl, or add --spike-rollback N, which goes back by itself"
            )
        trainer.rollback.asked = text

    def state(self) -> dict[str, Any]:
        whole = self.kept if self.flags.rl_epochs > 1 else {}
        kept = {str(sample): record.state() for sample, record in whole.items()}
        return {
            "coefficient": self.coefficient,
            "factor": self._factor,
            "round": [self.round_, self.first],
            "kept": kept,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.coefficient, self._factor = state["coefficient"], state["factor"]
        self.round_, self.first = state["round"]
        self.kept = {int(sample): self.kept_of(record) for sample, record in state["kept"].items()}
