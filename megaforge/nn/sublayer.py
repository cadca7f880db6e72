"""What a layer of the pattern is given and gives back, and what it remembers while a model writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.nn.losses import LossTerm
from megaforge.parallel.packed_sequence import PackedSequence

NOTHING: Mapping[str, Any] = MappingProxyType({})


class LayerLosses(Protocol):
    """What one layer adds to the loss of a micro-batch, as sums over this rank's tokens."""

    def terms(self, cfg: ModelConfig) -> dict[str, LossTerm]:
        """By name; ``layers`` of each says how many layers of the whole model make such a term."""


class LayerOutput(NamedTuple):
    """
    Attributes:
        update: [s(/tp), b, h], which is added to the residual stream.
        carried: tensors that the first layer of a kind makes for later ones (:meth:`LayerKind.carried`), by name.
        losses: what the layer adds to the loss, if anything: of one with a router
            :class:`megaforge.nn.moe.RouterLosses`.
    """

    update: Tensor
    carried: Mapping[str, Tensor] = NOTHING
    losses: LayerLosses | None = None


@dataclass
class LayerState:
    """What a layer remembers of the tokens it has seen: tensors [b, ...], None before the first. Subclasses declare
    them, and override :meth:`expect`, :attr:`expected`, :meth:`side_by_side`, :meth:`slots`, :meth:`recorded`,
    :meth:`fill`, :meth:`contents`, :meth:`stepped`, :meth:`mark` and :meth:`shorten` where tensors also
    have a place for each token.

    Attributes:
        can_shorten: whether the newest tokens can be forgotten.
    """

    can_shorten: ClassVar[bool] = False

    def expect(self, tokens: int) -> None:
        """Makes room for so many tokens in all, where it is known how many there will be; more may come."""

    @property
    def expected(self) -> int:
        """For how many there is room, where each has a place; 0: none was asked for."""
        return 0

    @classmethod
    def side_by_side(cls, states: Sequence[Self], length: int) -> Self:
        """The sequences of all ``states`` as one batch, of which the longest has seen ``length`` tokens."""
        fields = [[getattr(state, field.name) for state in states] for field in dataclasses.fields(cls)]
        make: Any = cls
        return make(*(None if tensors[0] is None else torch.cat(tensors) for tensors in fields))

    def select(self, rows: Tensor) -> Self:
        """The sequences ``rows``, int64 [n]; one may be named more than once."""
        return self._each(lambda tensor: tensor.index_select(0, rows))

    def slots(self, rows: int, places: int) -> Self:
        """Memory like this one's for ``rows`` sequences, with as many ``places`` where there is one for each token."""
        return self._each(lambda tensor: tensor.new_zeros((rows, *tensor.shape[1:])))

    def first(self, rows: int) -> Self:
        """The first ``rows`` sequences, in the same memory."""
        return self._each(lambda tensor: tensor[:rows])

    def recorded(self, place: Tensor) -> Self:
        """The same memory for a step that is recorded once for all places: where in it the next token goes says
        ``place`` [1], int64 on the device. Layers need not write to it: what they set in its place is copied."""
        return self._each(lambda tensor: tensor)

    def fill(self, other: Self) -> None:
        """Copies what ``other`` remembers to this memory, which has room for it."""
        for name in self._tensors():
            getattr(self, name).copy_(getattr(other, name))

    def contents(self) -> Iterator[Tensor]:
        """What is remembered, without places that nobody has used."""
        for name in self._tensors():
            yield getattr(self, name)

    def stepped(self) -> None:
        """A recorded step has taken in one token of each sequence."""

    def mark(self) -> Callable[[], None]:
        """What brings this memory back, once, to what it is now."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()}

        def back() -> None:
            for name, value in kept.items():
                setattr(self, name, value)

        return back

    def shorten(self, tokens: int) -> None:
        """Forgets all but the first ``tokens``; where :attr:`can_shorten`."""
        raise NotImplementedError

    def _tensors(self) -> list[str]:
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if isinstance(getattr(self, name), Tensor)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With each tensor as ``change`` makes it."""
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in self._tensors()})


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
