"""The steps of the iteration on a GPU: the operator ``torch.ops.megaforge.newton_schulz_steps``, whose code is in
``csrc/newton_schulz/cuda``.

Its products are of bf16 matrices with fp32 sums. Of ``X X^T`` and of its square the tiles on and below the diagonal are
computed and written twice; the polynomial is part of the same products. GPUs of capability 9.0 use wgmma, others from
8.0 on mma.sync; ``MEGAFORGE_WGMMA=0`` in the environment chooses the latter everywhere.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from megaforge.kernels.native import define, say_fallback, why_missing
from megaforge.kernels.newton_schulz.native import COMPILED

SWITCH = "MEGAFORGE_WGMMA"
OLDEST = (8, 0)
# Below one tile of 128 most of a block would be zeros, and cuBLAS is as good.
SMALLEST = 64
UNIT = 8  # values in the 16 bytes that rows must begin at
CUBLAS = "cuBLAS, which computes symmetric products whole. To build it: pip install --no-build-isolation -e ."


def on_gpu(x: Tensor) -> bool:
    """Whether a GPU iterates on ``x``, by this code or cuBLAS."""
    return x.device.type == "cuda"


def takes(x: Tensor) -> bool:
    """Whether there is compiled code for [b, m, n] matrices like ``x``: bf16 on a GPU, with sides that it can take.
    Says once where there is none for GPUs."""
    if not on_gpu(x) or x.dtype != torch.bfloat16:
        return False
    if "cuda" not in COMPILED:
        say_fallback("newton_schulz", f"no compiled code for cuda ({why_missing('newton_schulz', 'cuda')})", CUBLAS)
        return False
    m, n = x.shape[1:]
    return m % UNIT == n % UNIT == 0 and min(m, n) >= SMALLEST and _capability(x.device.index) >= OLDEST


def steps_by_cuda(x: Tensor, triples: Iterable[tuple[float, float, float]], wgmma: bool | None = None) -> Tensor:
    """Newton-Schulz steps of normalised matrices.

    Args:
        x: [b, m, n] bf16 on a GPU that :func:`takes` accepts; of spectral norm at most about one.
        triples: (a, b, c) of each step, ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` (``X^T X`` where m > n).
        wgmma: whether to use it; None: where it is there and the environment does not forbid it.

    Returns:
        [b, m, n] bf16. A matrix with a NaN becomes NaN; the others are what they are without it.

    Raises:
        RuntimeError: sides that are not multiples of 8, another dtype, or wgmma asked for where it is not.
    """
    if wgmma is None:
        wgmma = has_wgmma(x.device) and os.environ.get(SWITCH) != "0"
    flat = [float(value) for triple in triples for value in triple]
    result: Tensor = torch.ops.megaforge.newton_schulz_steps(x, flat, wgmma)
    return result


def has_wgmma(device: torch.device) -> bool:
    """Whether the compiled code has the form with wgmma for this GPU."""
    return "cuda" in COMPILED and device.type == "cuda" and _has_wgmma(device.index)


@functools.cache
def _has_wgmma(index: int | None) -> bool:
    with torch.cuda.device(index):
        return bool(importlib.import_module("megaforge.kernels._newton_schulz_cuda").has_wgmma())


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


define(
    "newton_schulz_steps(Tensor x, float[] coefficients, bool wgmma) -> Tensor",
    lambda x, coefficients, wgmma: x.new_empty(x.shape),
)
