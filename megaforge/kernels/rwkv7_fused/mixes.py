"""The mixes of a token shift with one backward pass, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_ELEMENTS_AT_ONCE = 1 << 16  # of [s, b, h] in the backward pass


class MixTokens(torch.autograd.Function):
    """Forward: ``x + (previous - x) * c`` for several c. Backward: their gradients together, in one walk over the
    tokens, with the sums over tokens in fp32 (fp64 for fp64); keeps x and previous only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, previous: Tensor, *coefficients: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, previous, *coefficients)
        return tuple(torch.lerp(x, previous, c.to(x.dtype)) for c in coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, previous, *coefficients = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        narrow = [c.to(x.dtype) for c in coefficients]
        dx, dprevious = torch.empty_like(x), torch.empty_like(x)
        dc = [torch.zeros(c.shape, dtype=wide, device=c.device) for c in coefficients]
        # On a CPU a few tokens at a time, which stay in cache; on a GPU all at once.
        step = max(1, CPU_ELEMENTS_AT_ONCE // x[0].numel()) if x.device.type == "cpu" else x.shape[0]
        for rows in (slice(start, start + step) for start in range(0, x.shape[0], step)):
            difference = previous[rows].to(wide) - x[rows]
            both, onto_previous = torch.zeros_like(difference), torch.zeros_like(difference)
            for grad, c, total in zip(grads, narrow, dc, strict=True):
                piece = grad[rows].to(wide)
                both += piece
                onto_previous.addcmul_(piece, c)
                total += (piece * difference).sum((0, 1))
            dprevious[rows] = onto_previous
            dx[rows] = both.sub_(onto_previous)
        return dx, dprevious, *(total.to(c.dtype) for total, c in zip(dc, coefficients, strict=True))
