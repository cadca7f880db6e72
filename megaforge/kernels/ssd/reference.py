"""The definition of Mamba-2's recurrence: the oracle of its chunked form."""

from __future__ import annotations

import torch


def ssd_recurrent(
    x: torch.Tensor,
    log_a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    document_start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, one token after the other; arguments and results as :func:`megaforge.kernels.ssd.ssd`."""
    batch, heads, width = x.shape[1:]
    groups, size = b.shape[2:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.new_zeros(batch, heads, width, size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    y = []
    for t in range(len(x)):
        if document_start is not None:
            state = state.masked_fill(document_start[t][:, None, None, None], 0)
        b_t, c_t = (each[t].to(dtype).repeat_interleave(heads // groups, dim=1) for each in (b, c))
        added = x[t].to(dtype)[..., None] * b_t[..., None, :]
        state = state * log_a[t].to(dtype).exp()[..., None, None] + added
        y.append((state @ c_t[..., None]).squeeze(-1))
    return torch.stack(y).to(x.dtype), state
