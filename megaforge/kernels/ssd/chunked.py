"""Mamba-2's recurrence in chunks: products of matrices within each, and one state handed from chunk to chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens; a chunk's matrix of pairs is then no larger than its inputs with heads of 64 channels


def ssd(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences, differentiable in every floating-point argument.

    Args:
        x: [s, b, H, P], any floating-point dtype. Mamba-2 calls it with its input times the step size.
        log_a: [s, b, H], logarithm of the decay, at most 0.
        b, c: [s, b, G, N]; each of the G groups serves H / G neighbouring heads.
        initial_state: [b, H, P, N], zero when None.
        document_start: bool [s, b]; the state is zero before a token where it is true.

    Returns:
        y [s, b, H, P] in the dtype of ``x`` and the final state [b, H, P, N], in fp32 (fp64 for fp64 inputs).
    """
    chunks = chunks_of(x, log_a, b, c, document_start)
    states, final = chunks.states(initial_state)
    return chunks.output(states), final


@dataclass(frozen=True)
class Chunks:
    """What all chunks are before the state that each begins with is known.

    Attributes:
        keep: [n, b, H], what each chunk leaves of the state it begins with.
        added: [n, b, H, P, N], what it adds to it.
        inner: [n, b, G, H/G, t, P], outputs but for that state.
        read: [n, b, G, H/G, t], how much of that state each token sees.
        c: [n, b, G, t, N].
        length, dtype: of the sequences, and of what comes out.
    """

    keep: Tensor
    added: Tensor
    inner: Tensor
    read: Tensor
    c: Tensor
    length: int
    dtype: torch.dtype

    def states(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states [n, b, H, P, N] before each chunk, and the one [b, H, P, N] behind the last."""
        state = torch.zeros_like(self.added[0]) if initial is None else initial.to(self.added.dtype)
        before = []
        for keep, added in zip(self.keep[..., None, None].unbind(), self.added.unbind(), strict=True):
            before.append(state)
            state = keep * state + added
        return torch.stack(before), state

    def output(self, states: Tensor) -> Tensor:
        """y [s, b, H, P] from the states before each chunk."""
        groups, each = self.inner.shape[2:4]
        seen = self.c @ states.unflatten(2, (groups, each)).flatten(3, 4).transpose(-1, -2)  # [n, b, G, t, H/G * P]
        y = self.inner + seen.unflatten(-1, (each, -1)).transpose(3, 4) * self.read[..., None]
        return y.permute(0, 4, 1, 2, 3, 5).flatten(3, 4).flatten(0, 1)[: self.length].to(self.dtype)


def chunks_of(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, document_start: Tensor | None) -> Chunks:
    """Arguments as :func:`ssd`. The last chunk is filled up with tokens that leave the state alone."""
    length, heads = x.shape[0], x.shape[2]
    groups = b.shape[2]
    size = min(CHUNK, length)
    out_dtype, dtype = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32

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
    return Chunks(keep.flatten(2, 3), added, inner, read, c, length, out_dtype)
