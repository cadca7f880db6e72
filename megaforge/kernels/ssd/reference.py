"""The definition of Mamba-2's recurrence: the oracle of its other forms."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_recurrent(
    x: Tensor,
    step: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other; arguments and results as :func:`megaforge.kernels.ssd.ssd`."""
    batch, heads, width = x.shape[1:]
    groups, size = b.shape[2:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.new_zeros(batch, heads, width, size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    y = []
    for t in range(len(x)):
        if document_start is not None:
            state = state.masked_fill(document_start[t][:, None, None, None], 0)
        x_t, step_t = x[t].to(dtype), step[t].to(dtype)
        b_t, c_t = (each[t].to(dtype).repeat_interleave(heads // groups, dim=1) for each in (b, c))
        added = (x_t * step_t[..., None])[..., None] * b_t[..., None, :]
        state = state * (a.to(dtype) * step_t).exp()[..., None, None] + added
        y.append((state @ c_t[..., None]).squeeze(-1) + x_t * skip.to(dtype)[:, None])
    return torch.stack(y).to(x.dtype), state
