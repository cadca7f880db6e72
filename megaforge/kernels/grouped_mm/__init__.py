"""The experts' matrix products: every expert's own matrix on its own rows, which lie one expert after the other.
:mod:`.reference` has the definition.

torch's ``grouped_mm`` does them in one call. Where it is taken is a rule, :func:`takes_grouped_mm`:

- never where it cannot: it wants fp32 or bf16 on a CPU, bf16 on a GPU (sm_80 on), no bias, and rows of a multiple of
  16 bytes that start at one (up to torch 2.12 it fails on others);
- on a GPU always else: one launch for all experts, and no host that walks through them;
- on a CPU for few rows an expert. There it is the same loop over the same GEMM, in C++: the same bits, and a few
  microseconds less for each expert. Measured on two Zen 5 cores with torch 2.13, time over that of the loop, forward:
  64 experts of 64 rows 0.83 (fp32) and 0.68 (bf16); 128 of 4 rows 0.92 and 0.74; 8 of 256 rows, 512 x 1152, 1.05
  and 0.99; 8 of 1,024 rows 1.02 and 0.96. So it is taken up to :data:`FEW_ROWS` rows an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.device import upload
from megaforge.kernels.native import say_fallback

FEW_ROWS = 128  # an expert, on average
_ALIGNMENT = 16  # bytes
_GROUPED: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def takes_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether rows ``x`` [N, in] go through torch's ``grouped_mm`` for ``weight`` [E, out, in]; see above."""
    if _GROUPED is None or x.dtype != weight.dtype or not len(x):
        return False
    if any(width * x.element_size() % _ALIGNMENT for width in weight.shape[1:]):
        return False
    if _starts_between(x) or _starts_between(weight):
        return False
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.bfloat16) and len(x) <= FEW_ROWS * len(weight)
    return x.device.type == "cuda" and x.dtype == torch.bfloat16


def _starts_between(x: Tensor) -> bool:
    """Whether the first element lies between two multiples of the alignment."""
    return x.device.type != "meta" and x.data_ptr() % _ALIGNMENT != 0


def say_loop(x: Tensor, weight: Tensor) -> None:
    """Says that a GPU walks through the experts. On CPUs the loop is as good."""
    if x.device.type == "cuda":
        say_fallback(
            "experts",
            f"grouped_mm does not take these tensors (rows in {x.dtype}, matrices in {weight.dtype}); it wants bf16 "
            "and widths that are multiples of 8 elements",
            "one product an expert, several times slower",
        )


def run_ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [E], the row at which each expert's run ends, on ``device``, which nobody waits for."""
    return upload(torch.tensor(list(accumulate(counts)), dtype=torch.int32), device)


def grouped_linear(x: Tensor, weight: Tensor, counts: tuple[int, ...], ends: Tensor | None = None) -> Tensor:
    """Each expert's own linear map on its own rows, differentiable.

    Args:
        x: [N, in], rows sorted by expert.
        weight: [E, out, in].
        counts: rows of each expert; they add up to N.
        ends: :func:`run_ends` of ``counts`` where several products share it; None: made here.

    Returns:
        [N, out].
    """
    return _GroupedLinear.apply(x, weight, counts, run_ends(counts, x.device) if ends is None else ends)


class _GroupedLinear(torch.autograd.Function):
    """Forward: ``y_n = x_n W_e^T``. Backward: the gradient of W is written expert by expert into one tensor; an expert
    without rows gets zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...], ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.ends = counts, ends
        if takes_grouped_mm(x, weight):
            return _grouped(x, weight.transpose(1, 2), ends)
        if len(x):
            say_loop(x, weight)
        out = x.new_empty(x.shape[0], weight.shape[1])
        for matrix, rows, result in zip(weight, x.split(counts), out.split(counts), strict=True):
            torch.mm(rows, matrix.t(), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if takes_grouped_mm(x, weight):
            grad = grad.contiguous()
            grad = grad.clone() if _starts_between(grad) else grad
            return _grouped(grad, weight, ctx.ends), _grouped(grad.t(), x, ctx.ends), None, None
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        pieces = zip(
            weight, grad_weight, x.split(ctx.counts), grad.split(ctx.counts), grad_x.split(ctx.counts), strict=True
        )
        for matrix, grad_matrix, rows, grad_rows, out in pieces:
            torch.mm(grad_rows, matrix, out=out)
            torch.mm(grad_rows.t(), rows, out=grad_matrix)
        return grad_x, grad_weight, None, None


def _grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    assert _GROUPED is not None
    return _GROUPED(a, b, offs=ends)
