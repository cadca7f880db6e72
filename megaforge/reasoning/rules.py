"""How fast weights change in a step: what is added to B [out, r] for z = W x, what the layer's own matrix gave, and u,
the unit vector along A x. Each is a sum over the step's tokens, of which the mean is taken. What was read of B is not
written to it again, as y = z + alpha clip(B) u in the place of z would do: then old pairs grow with every new one.

A rule is a function of a :class:`Step` in :data:`megaforge.registry.PLASTIC_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """One step of b sequences. ``out`` may be this rank's part of the output features.

    Attributes:
        fast: [b, out, r], B.
        bound: what is read of it is within plus and minus this.
        alpha: on what is read.
        zu: [b, out, r], the sum of z u^T over all tokens of the step.
        squares: makes :attr:`uu`, which not every rule reads.
        z: [b, C, out], of the tokens that are here; zero where there is none.
        over_tokens: sums over the ranks that the step's tokens are on.
        over_features: sums over the ranks that the output features are on.
    """

    fast: Tensor
    bound: float
    alpha: float
    zu: Tensor
    squares: Callable[[], Tensor]
    z: Tensor
    over_tokens: Callable[[Tensor], Tensor]
    over_features: Callable[[Tensor], Tensor]

    @property
    def seen(self) -> Tensor:
        """[b, out, r], what is read of B: within the clamp."""
        return self.fast.clamp(-self.bound, self.bound)

    @property
    def uu(self) -> Tensor:
        """[b, r, r], the sum of u u^T over all tokens of the step. Collective over the ranks that they are on."""
        return self.squares()


def hebb(step: Step) -> Tensor:
    """z u^T (Miconi et al., arXiv 1804.02464; with decay the fast weights of Ba et al., arXiv 1610.06258)."""
    return step.zu


def oja(step: Step) -> Tensor:
    """z (u - B^T z)^T (Oja, J. Math. Biology 15, 1982)."""
    return step.zu - step.over_tokens(step.z.mT @ step.over_features(step.z @ step.fast))


def delta(step: Step) -> Tensor:
    """(z - alpha clip(B) u) u^T: what is read comes to be z (Schlag et al., arXiv 2102.11174)."""
    return step.zu - step.alpha * step.seen @ step.uu
