"""What plastic adapters remember of sequences that are being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.nn.sublayer import LayerState
from megaforge.reasoning.segments import Segments


@dataclass
class FastWeights(LayerState):
    """Of one matrix; None before the first token.

    Attributes:
        fast: [b, out, r], B of the open segment.
        z, u: [b, C, out], [b, C, r], of the tokens in it.
        tokens: int64 [b], how many they are.
        open: int64 [b], which stretch of its document it is.
    """

    fast: Tensor | None = None
    z: Tensor | None = None
    u: Tensor | None = None
    tokens: Tensor | None = None
    open: Tensor | None = None

    def continued(self, z: Tensor, u: Tensor, tokens_BK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, u and the numbers of tokens of the segments with those that the open one has already, and B."""
        assert self.fast is not None and self.z is not None and self.u is not None and self.tokens is not None
        z, u, tokens = z.clone(), u.clone(), tokens_BK.clone()
        z[:, 0] += self.z
        u[:, 0] += self.u
        tokens[:, 0] += self.tokens
        return z, u, tokens, self.fast

    def leave(self, fast_BK: Tensor, z: Tensor, u: Tensor, tokens_BK: Tensor, segments: Segments) -> None:
        """Keeps the last segment of each sequence."""
        rows = torch.arange(len(z), device=z.device)
        self.fast, self.z, self.u = (x[rows, segments.last_B] for x in (fast_BK, z, u))
        self.tokens, self.open = tokens_BK[rows, segments.last_B], segments.open_B.clone()


@dataclass
class PlasticState(LayerState):
    """The memory of a mixer or FFN and of the adapters in it.

    Attributes:
        inner: the sublayer's own, if it has one.
        fast: of each matrix with an adapter, in the order of the layers.
    """

    inner: LayerState | None = None
    fast: list[FastWeights] = field(default_factory=list)

    def expect(self, tokens: int) -> None:
        if self.inner is not None:
            self.inner.expect(tokens)

    @property
    def expected(self) -> int:
        return 0 if self.inner is None else self.inner.expected

    @classmethod
    def side_by_side(cls, states: Sequence[PlasticState], length: int) -> PlasticState:
        inner = [state.inner for state in states if state.inner is not None]
        fast = [FastWeights.side_by_side(each, length) for each in zip(*(state.fast for state in states), strict=True)]
        return cls(type(inner[0]).side_by_side(inner, length) if inner else None, fast)

    def select(self, rows: Tensor) -> PlasticState:
        return PlasticState(
            None if self.inner is None else self.inner.select(rows), [one.select(rows) for one in self.fast]
        )

    def contents(self) -> Iterator[Tensor]:
        for one in (self.inner, *self.fast):
            if one is not None:
                yield from one.contents()

    def mark(self) -> Callable[[], None]:
        marks = [one.mark() for one in (self.inner, *self.fast) if one is not None]

        def back() -> None:
            for one in marks:
                one()

        return back

    def slots(self, rows: int, places: int) -> PlasticState:
        raise UserError(
            "--cuda-graph: fast weights (--peft plastic) change on the host, which no graph holds; leave it out"
        )
