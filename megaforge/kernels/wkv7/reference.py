"""The definition of WKV-7: the oracle of its other forms."""

from __future__ import annotations

import torch


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that states and chunk products are kept in for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wkv7_recurrent(
    r: torch.Tensor,
    log_w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    document_start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, one token after the other; arguments and results as :func:`wkv7`."""
    batch, heads, n = r.shape[1:]
    dtype, y_dtype = state_dtype(v.dtype), v.dtype
    state = v.new_zeros(batch, heads, n, n, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    inputs = (x.to(dtype).unbind() for x in (r, log_w.to(dtype).exp(), k, v, a, b))
    y = []
    for t, (r_t, w_t, k_t, v_t, a_t, b_t) in enumerate(zip(*inputs, strict=True)):
        if document_start is not None:
            state = state.masked_fill(document_start[t][:, None, None, None], 0)
        removed = state @ a_t[..., None]
        state = state * w_t[..., None, :] + removed * b_t[..., None, :] + v_t[..., None] * k_t[..., None, :]
        y.append((state @ r_t[..., None]).squeeze(-1))
    return torch.stack(y).to(y_dtype), state
