"""WKV-7 by the Triton kernels of fla-core (fla-org/flash-linear-attention, ``fla.ops.rwkv7``), on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaforge.errors import require
from megaforge.kernels.wkv7.reference import state_dtype

# RWKV-7's log decays lie above it, by which fla-core may use chunks of 64 tokens.
LOWEST_LOG_DECAY = -0.6066


def fla_kernels() -> Any:
    """The module of fla-core's RWKV-7 operators.

    Raises:
        UserError: it is not installed.
    """
    return require("fla.ops.rwkv7", extra="gpu", purpose="--wkv-backend fla")


def wkv7_fla(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as :func:`megaforge.kernels.wkv7.wkv7`, with RWKV-7's decays only.

    fla-core has the batch first, states as [key, value], and documents as sequences of one long row.
    """
    s, batch, heads, n = v.shape
    dtype = state_dtype(v.dtype)
    inputs = [x.transpose(0, 1) for x in (r, log_w.to(dtype), k, v, a, b)]
    state = None if initial_state is None else initial_state.to(dtype).transpose(-1, -2)
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True, "lower_bound": LOWEST_LOG_DECAY}
    kernel = fla_kernels().chunk_rwkv7
    if document_start is None:
        y, final = kernel(*inputs, initial_state=None if state is None else state.contiguous(), **options)
        return y.transpose(0, 1), final.transpose(-1, -2)
    starts = document_start.transpose(0, 1).clone()
    starts[:, 0] = True
    bounds = starts.flatten().nonzero().squeeze(1)
    bounds = torch.cat([bounds, bounds.new_tensor([s * batch])])
    first = torch.searchsorted(bounds, torch.arange(batch, device=v.device) * s)
    last = torch.cat([first[1:], first.new_tensor([bounds.numel() - 1])]) - 1
    if state is not None:
        carried = state.masked_fill(document_start[0][:, None, None, None], 0)
        state = carried.new_zeros(bounds.numel() - 1, heads, n, n).index_copy(0, first, carried)
    flat = [x.reshape(1, s * batch, heads, n) for x in inputs]
    y, final = kernel(*flat, initial_state=state, cu_seqlens=bounds, **options)
    return y.view(batch, s, heads, n).transpose(0, 1), final[last].transpose(-1, -2)
