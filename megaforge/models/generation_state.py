"""What a model remembers while it writes: states of sequences side by side, whatever their lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaforge.nn.sublayer import LayerState


@dataclass
class GenerationState:
    """What a model remembers between calls of :meth:`HybridModel.logits`.

    Attributes:
        layers: of each mixer and FFN in order; None for one that remembers nothing.
        length: places in the caches, of the longest sequence.
        unused_B: int64 [b], how many of them are empty, at the beginning of each sequence; None before the first token.
        padded: whether any is.
        place: int64 [1] on the device: ``length`` of a step that is recorded once for all lengths; else None.
    """

    layers: list[LayerState | None] = field(default_factory=list)
    length: int = 0
    unused_B: Tensor | None = None
    padded: bool = False
    place: Tensor | None = None

    @property
    def padding_B(self) -> Tensor | None:
        """``unused_B`` where any sequence has empty places."""
        return self.unused_B if self.padded else None

    @property
    def can_shorten(self) -> bool:
        """Whether every layer can forget its newest tokens, which recurrent ones cannot."""
        return all(layer is None or layer.can_shorten for layer in self.layers)

    def shorten(self, tokens: int) -> None:
        """Forgets all but the first ``tokens``; where :attr:`can_shorten`."""
        for layer in self.layers:
            if layer is not None:
                layer.shorten(tokens)
        self.length = tokens

    def contents(self) -> Iterator[Tensor]:
        """What all layers remember, without places that nobody has used."""
        if self.unused_B is not None:
            yield self.unused_B
        for layer in self.layers:
            if layer is not None:
                yield from layer.contents()

    def copy(self) -> GenerationState:
        """The same sequences in memory of their own."""
        rows = 0 if self.unused_B is None else len(self.unused_B)
        like = torch.zeros(0, dtype=torch.long) if self.unused_B is None else self.unused_B
        return chosen(self, torch.arange(rows, device=like.device))

    def mark(self) -> Callable[[], None]:
        """What brings this memory back, once, to what it is now."""
        length, marks = self.length, [layer.mark() for layer in self.layers if layer is not None]

        def back() -> None:
            self.length = length
            for one in marks:
                one()

        return back


def side_by_side(states: Sequence[GenerationState]) -> GenerationState:
    """The sequences of all ``states`` as one batch. Caches end together; recurrent states need no alignment.

    Raises:
        ValueError: one has seen no tokens, and so holds no sequences.
    """
    length, unused = max(state.length for state in states), []
    for state in states:
        if state.unused_B is None:
            raise ValueError("an empty state holds no sequences")
        unused.append(state.unused_B + length - state.length)
    layers = [
        None if parts[0] is None else type(parts[0]).side_by_side(parts, length)
        for parts in zip(*(state.layers for state in states), strict=True)
    ]
    return GenerationState(layers, length, torch.cat(unused), padded=True)


def chosen(state: GenerationState, rows: Tensor) -> GenerationState:
    """The sequences ``rows`` of a batch, int64 [n] on its device, in this order; one may be named more than once."""
    layers = [None if layer is None else layer.select(rows) for layer in state.layers]
    unused = None if state.unused_B is None else state.unused_B.index_select(0, rows)
    return GenerationState(layers, state.length, unused, state.padded)
