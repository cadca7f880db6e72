"""Relations of queries with queries, keys with keys and values with values: what attention layers of two models have in
common whatever their widths (MiniLMv2, Wang et al., arXiv 2012.15828; of 1.58-bit students BitDistill, 2510.13998)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaforge.errors import UserError
from megaforge.nn.recompute import recomputed


class Projection(NamedTuple):
    """A layer whose output [s, b, sum of heads x width] is this rank's heads of one or more vectors a token.

    Attributes:
        parts: (heads, width) of each, in order.
    """

    module: nn.Module
    parts: tuple[tuple[int, int], ...]


class HasRelations(Protocol):
    """A mixer with queries, keys and values, or what stands for them."""

    def relation_projections(self) -> Sequence[Projection]:
        """What makes them, in this order."""


class Watch:
    """The vectors of a mixer in the newest forward pass in which it was looked at."""

    def __init__(self, mixer: HasRelations, *, training_only: bool) -> None:
        """``training_only``: evaluations are not looked at."""
        self._projections = list(mixer.relation_projections())
        self._found: dict[int, Tensor] = {}
        for place, projection in enumerate(self._projections):

            def keep(module: nn.Module, _: object, out: Tensor, place: int = place) -> None:
                if module.training or not training_only:
                    self._found[place] = out

            projection.module.register_forward_hook(keep)

    @property
    def heads(self) -> list[int]:
        """Of this rank, of each kind of vector."""
        return [heads for projection in self._projections for heads, _ in projection.parts]

    def take(self) -> list[Tensor]:
        """[b, heads, s, width] of each kind of vector; they are forgotten here."""
        vectors = []
        for place, projection in enumerate(self._projections):
            out = self._found.pop(place)
            widths = [heads * width for heads, width in projection.parts]
            for part, (heads, width) in zip(out.split(widths, -1), projection.parts, strict=True):
                vectors.append(part.unflatten(-1, (heads, width)).permute(1, 2, 0, 3))
        return vectors


def mixer_with_relations(model: nn.Module, index: int | None, whose: str) -> HasRelations:
    """The mixer of block ``index``, or the last that has relations.

    Raises:
        UserError: it has none.
    """
    layers = cast(dict[str, nn.Module], model.layers)
    having = {place: block.mixer for place, block in layers.items() if hasattr(block.mixer, "relation_projections")}
    place = next(reversed(having), None) if index is None else str(index)
    if place is None or place not in having:
        raise UserError(
            f"--distill-relation-layer {index}: that block of {whose} has no queries, keys and values; blocks "
            f"{', '.join(having) or 'none'} have"
        )
    return cast(HasRelations, having[place])


def relation_divergence(ours: Sequence[Tensor], theirs: Sequence[Tensor], visible_BSS: Tensor) -> Tensor:
    """Sum over all tokens of the divergences, mean over this rank's heads of a kind of vectors, and over the kinds.

    Args:
        ours, theirs: of each kind [b, heads, s, width], the same heads, any widths; only ``ours`` get a gradient.
        visible_BSS: bool [b or 1, s, s], which tokens each token is compared with.

    Returns:
        A scalar, fp32 (fp64 for fp64).
    """
    pairs = zip(ours, theirs, strict=True)
    return torch.stack(
        [recomputed(True, _divergence, a, b.detach(), visible_BSS) / a.shape[1] for a, b in pairs]
    ).mean()


def _divergence(ours: Tensor, theirs: Tensor, visible_BSS: Tensor) -> Tensor:
    own, their = (_log_relations(x, visible_BSS) for x in (ours, theirs))
    pointwise = F.kl_div(own, their, reduction="none", log_target=True)
    return pointwise.masked_fill(~visible_BSS.unsqueeze(1), 0).sum()


def _log_relations(x: Tensor, visible_BSS: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scores = wide @ wide.transpose(-1, -2) / math.sqrt(x.shape[-1])
    # A large number in place of -inf: its softmax is 0 as well, and its logarithm a number.
    return F.log_softmax(scores.masked_fill(~visible_BSS.unsqueeze(1), -1e9), dim=-1)
