"""Mamba-2's recurrence in chunks: products of matrices within each, and one state handed from chunk to chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens; a chunk's matrix of pairs is then no larger than its inputs with heads of 64 channels


@dataclass(frozen=True)
class Chunks:
    """What all chunks are before the state that each begins with is known; a :class:`.piece.Piece`.

    Attributes:
        keep: [n, b, H], what each chunk leaves of the state it begins with.
        added: [n, b, H, P, N], what it adds to it.
        inner: [n, b, G, H/G, t, P], outputs but for that state.
        read: [n, b, G, H/G, t], how much of that state each token sees.
        c: [n, b, G, t, N].
        skipped: [s, b, H, P], what passes the state by.
        dtype: of what comes out.
    """

    keep: Tensor
    added: Tensor
    inner: Tensor
    read: Tensor
    c: Tensor
    skipped: Tensor
    dtype: torch.dtype

    def summary(self) -> tuple[Tensor, Tensor]:
        return self.keep.prod(0), self._states(None)[1]

    def output(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        states, final = self._states(initial_state)
        groups, each = self.inner.shape[2:4]
        seen = self.c @ states.unflatten(2, (groups, each)).flatten(3, 4).transpose(-1, -2)  # [n, b, G, t, H/G * P]
        y = self.inner + seen.unflatten(-1, (each, -1)).transpose(3, 4) * self.read[..., None]
        y = y.permute(0, 4, 1, 2, 3, 5).flatten(3, 4).flatten(0, 1)[: len(self.skipped)]
        return (y + self.skipped).to(self.dtype), final

    def _states(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states [n, b, H, P, N] before each chunk, and the one [b, H, P, N] behind the last."""
        state = torch.zeros_like(self.added[0]) if initial is None else initial.to(self.added.dtype)
        before = []
        for keep, added in zip(self.keep[..., None, None].unbind(), self.added.unbind(), strict=True):
            before.append(state)
            state = keep * state + added
        return torch.stack(before), state


def ssd_chunked(
    x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, document_start: Tensor | None
) -> Chunks:
    """Arguments as :func:`megaforge.kernels.ssd.ssd`. The last chunk is filled up with tokens that leave the state
    alone."""
    length, heads = x.shape[0], x.shape[2]
    groups = b.shape[2]
    size = min(CHUNK, length)
    out_dtype, dtype = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    x, step = x.to(dtype), step.to(dtype)
    skipped, log_a, x = x * skip.to(dtype)[:, None], a.to(dtype) * step, x * step[..., None]

    def cut(whole: Tensor, kept: torch.dtype = dtype) -> Tensor:
        """[s, b, ...] -> [n, b, ..., t]."""
        whole = whole.to(kept)
        missing = -length % size
        if missing:
            whole = F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, missing))
        return whole.unflatten(0, (-1, size)).movedim(1, -1)

    x = cut(x).unflatten(2, (groups, heads // groups))  # [n, b, G, H/G, P, t]
    through = cut(log_a).unflatten(2, (groups, heads // groups)).cumsum(-1)  # [n, b, G, H/G, t]
    b, c = cut(b), cut(c).transpose(-1, -2)  # [n, b, G, N, t], [n, b, G, t, N]
    # Exponents are differences of sums, and none is above zero: nothing overflows, and nothing is divided by a decay.
    sees = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    last = through[..., -1:]
    to_end, read, keep = (last - through).exp(), through.exp(), last.exp().squeeze(-1)
    if document_start is not None:
        # Documents are numbered within the chunk, 0 being the one that its first state belongs to.
        number = cut(document_start, torch.long).cumsum(-1)[:, :, None, None]
        sees = sees & (number[..., :, None] == number[..., None, :])
        to_end = to_end * (number == number[..., -1:])
        read, keep = read * (number == 0), keep * (number[..., -1] == 0)
    decay = (through[..., :, None] - through[..., None, :]).masked_fill(~sees, -torch.inf).exp()
    pairs = (c @ b)[:, :, :, None] * decay  # [n, b, G, H/G, t, t]
    inner = pairs @ x.transpose(-1, -2)
    added = (x * to_end[..., None, :]).flatten(3, 4) @ b.transpose(-1, -2)  # [n, b, G, H/G * P, N]
    added = added.unflatten(3, (heads // groups, -1)).flatten(2, 3)
    return Chunks(keep.flatten(2, 3), added, inner, read, c, skipped, out_dtype)
