"""What a layer of the pattern is given and gives back, and what it remembers while a model writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from megaforge.parallel.packed_sequence import PackedSequence

NOTHING: Mapping[str, Any] = MappingProxyType({})


class LayerOutput(NamedTuple):
    """
    Attributes:
        update: [s(/tp), b, h], which is added to the residual stream.
        carried: tensors that the first layer of a kind makes for later ones (:meth:`LayerKind.carried`), by name.
        losses: of layers with a router (:class:`megaforge.nn.moe.RouterLosses`).
    """

    update: Tensor
    carried: Mapping[str, Tensor] = NOTHING
    losses: Any = None


@dataclass
class LayerState:
    """What a layer remembers of the tokens it has seen: tensors [b, ...], None before the first. Subclasses declare
    them, and override :meth:`side_by_side` where tensors also have a place for each token."""

    def expect(self, tokens: int) -> None:
        """Makes room for so many tokens in all, where it is known how many there will be; more may come."""

    @classmethod
    def side_by_side(cls, states: Sequence[Self], length: int) -> Self:
        """The sequences of all ``states`` as one batch, of which the longest has seen ``length`` tokens."""
        fields = [[getattr(state, field.name) for state in states] for field in dataclasses.fields(cls)]
        make: Any = cls
        return make(*(None if tensors[0] is None else torch.cat(tensors) for tensors in fields))

    def select(self, rows: Tensor) -> Self:
        """The sequences ``rows``, int64 [n]; one may be named more than once."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        make: Any = type(self)
        return make(*(f.index_select(0, rows) if isinstance(f, Tensor) else f for f in fields))


class Sublayer(Protocol):
    """A mixer or an FFN: an ``nn.Module`` on the normed residual stream."""

    def __call__(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        state: Any = None,
    ) -> LayerOutput:
        """
        Args:
            x: [s(/tp), b, h].
            info: the micro-batch's sequences.
            carried: what earlier layers have made for later ones.
            state: from :meth:`new_state`; the tokens continue those it has seen, and it takes them in.
        """

    def new_state(self) -> LayerState | None:
        """A memory of no tokens; None for a layer that sees each token alone."""
