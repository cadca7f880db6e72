"""``--repeat-suspect-steps``: a gradient that looks wrong is computed once more, before it is used."""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING, NamedTuple

from megaforge.config.launcher import print_rank_0
from megaforge.device import get_random_state, set_random_state
from megaforge.errors import UserError
from megaforge.monitor.spikes import RecentSteps
from megaforge.optim.digests import hashed_rows
from megaforge.parallel.agree import exchange

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from megaforge.training.recovery import Gradients
    from megaforge.training.trainer import Trainer


class _Bits(NamedTuple):
    """What one rank has computed, to be compared to the bit: the terms of its own micro-batches, and its gradients."""

    own: tuple[str, ...]
    gradients: int


class Repeating:
    """Computes a step's gradient again where it is not finite, or where the loss or its norm is a spike
    (:func:`megaforge.monitor.spikes.is_spike`), from the same weights, batch and random states.

    Equal bits: the program or the data made it so, and the run goes on as it would have. Other bits: some device
    computes wrongly; the run ends, and names the ranks whose own forward passes differ, where that tells.
    """

    def __init__(self, window: int) -> None:
        self.recent = RecentSteps(window)
        self._random: dict[str, Tensor] = {}

    def begin(self, trainer: Trainer) -> None:
        """A step begins."""
        self._random = {name: state.clone() for name, state in get_random_state(trainer.ctx.device).items()}

    def judge(self, trainer: Trainer, found: Gradients, again: Callable[[], Gradients]) -> Gradients:
        """``found``, or the same computed ``again`` where it is suspect. Collective there.

        Raises:
            UserError: on every rank: the two differ.
        """
        reason = self._suspicion(trainer, found)
        if reason is None:
            return found
        first = _bits(trainer, found)
        set_random_state(trainer.ctx.device, self._random)
        second_found = again()
        second = _bits(trainer, second_found)
        told = exchange(trainer.ctx, (socket.gethostname(), first.own == second.own, first == second))
        equal, step = all(same for _, _, same in told), trainer.iteration + 1
        ranks = [rank for rank, (_, own, _) in enumerate(told) if not own]
        hosts = sorted({host for host, own, _ in told if not own or not ranks})
        trainer.events.tell("repeat", step=step, reason=reason, equal=equal, ranks=ranks, hosts=[] if equal else hosts)
        if not equal:
            raise UserError(self._end(step, reason, ranks, hosts))
        print_rank_0(f"iteration {step}: {reason}; computed again it has the same bits: the program or the data did it")
        return second_found

    def _end(self, step: int, reason: str, ranks: list[int], hosts: list[str]) -> str:
        where = (
            f"rank {', '.join(map(str, ranks))} on {', '.join(hosts)}"
            if ranks
            else f"a backward pass or a sum over ranks, on one of {', '.join(hosts)}"
        )
        return (
            f"iteration {step}: {reason}; computed again from the same inputs it has other bits: a device "
            f"computes wrongly ({where}), or the program is not deterministic (--deterministic). Nothing was updated: "
            "leave that machine out, and go on from the newest checkpoint"
        )

    def _suspicion(self, trainer: Trainer, found: Gradients) -> str | None:
        """Why the step is suspect; otherwise its numbers tell what is usual."""
        if not math.isfinite(found.norm):
            return None if trainer.scaler.can_fall else f"the gradient norm is {found.norm}"
        return self.recent.suspicion({"loss": found.sums.means()["loss"], "grad_norm": found.norm})


def _bits(trainer: Trainer, found: Gradients) -> _Bits:
    own = tuple(f"{name} {value.hex()}" for name, value in sorted(found.sums.own().items()))
    hashes = (int(hashed_rows(main.grad.detach().reshape(1, -1))) for main in trainer.optimizer.main.trained)
    return _Bits(own, sum((place + 1) * one for place, one in enumerate(hashes)) % 2**64)
