"""Queries, keys and values of a mixer, or what stands for them, as its forward pass makes them: of which
:mod:`megaforge.training.relation_loss` compares two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

from torch import Tensor, nn

from megaforge.config.pattern import BlockKind
from megaforge.errors import UserError


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
    whole = {
        place: block for place, block in layers.items() if cast(BlockKind, block.kind).capacity is None
    }  # it sees every token
    having = {place: block.mixer for place, block in whole.items() if hasattr(block.mixer, "relation_projections")}
    place = next(reversed(having), None) if index is None else str(index)
    if place is None or place not in having:
        raise UserError(
            f"--distill-relation-layer {index}: that block of {whose} has no queries, keys and values of every "
            f"token; blocks "
            f"{', '.join(having) or 'none'} have"
        )
    return cast(HasRelations, having[place])
