"""The correlation objective of fast weights (``--plastic-correlation``): what is read of them should go with what the
layer gives.

Of a token whose layer gives z = W x and which sees B:

    L = -<z, B u> + (1 - decay) / (2 rate) ||B||^2,

z held fast. A step of size ``rate`` down its gradient in B is the rule ``hebb`` with its decay
(:mod:`megaforge.reasoning.rules`). B is no parameter, and is written by the rule; the loss trains A, through u and
through all that was written with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.nn.losses import LossTerm


@dataclass(frozen=True)
class CorrelationLoss:
    """What the adapters of a mixer or FFN add to the loss of a micro-batch.

    Attributes:
        sums: of each matrix, over this rank's tokens.
    """

    sums: Sequence[Tensor]

    def terms(self, cfg: ModelConfig) -> dict[str, LossTerm]:
        """``correlation_loss``, summed over matrices, a mean over tokens."""
        total = sum(self.sums[1:], self.sums[0])
        return {"correlation_loss": LossTerm(total, "tokens", cfg.plastic_correlation)}


def correlation(fast: Tensor, z: Tensor, u: Tensor, counts: Tensor, shrink: float) -> Tensor:
    """L, summed over the tokens that are here.

    Args:
        fast: [b, K, out, r], the B that each segment's tokens see.
        z, u: [b, K, C, out] and [b, K, C, r].
        counts: [b, K, C, 1], 1 of each token that counts; 0 of others, and where there is none.
        shrink: (1 - decay) / (2 rate).
    """
    together = (fast * ((z.detach() * counts).mT @ u)).sum()
    return shrink * (counts.sum((2, 3)) * fast.square().sum((2, 3))).sum() - together
