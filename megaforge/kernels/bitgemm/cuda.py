"""What GPUs have of :mod:`megaforge.kernels.bitgemm` beyond its operators; the code is in ``csrc/bitgemm/cuda``.

Weights are decoded in registers, in the order that tensor cores take them in. Up to 4 tokens ``gemv`` multiplies by
dp4a; up to 32 ``stream`` does by mma.sync; in both each warp has a share of the columns. More tokens take tiles:
``mma`` (mma.sync) or, from 65 on and where the build and the GPU have it (sm_90a), ``wgmma``; ``MEGAFORGE_WGMMA=0`` in
the environment does without. Where there are fewer tiles than a GPU has processors, each is computed in parts. Scales
of groups are ``mma``'s, where the groups are multiples of 32 columns; ``plain``, one thread a result, takes all others.
All forms give the same bits.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from megaforge.kernels.native import define, load, say_fallback

FORMS = ("plain", "gemv", "stream", "mma", "wgmma")
UNIT = 32  # columns that one instruction multiplies
STAGE = 128  # columns that a block of threads loads at a time


def panel_shape(rows: int, bits: int, columns: int) -> tuple[int, int]:
    """Of what ``bitgemm_prepare`` makes on a GPU: int32, a panel of 16 rows after the other."""
    unit = max(STAGE, 256 // bits)
    return -(-rows // 16), -(-columns // unit) * unit * bits // 2


def say_plain(packed: Tensor, columns: int, groups: int) -> None:
    """Says once that a GPU computes these groups in a slow way, where it does."""
    if packed.device.type == "cuda" and groups > 1 and columns // groups % UNIT and "cuda" in COMPILED:
        why = f"groups of {columns // groups} columns are not a multiple of {UNIT}"
        say_fallback("bitgemm", why, "one thread a result on GPUs, many times slower")


def linear_by(
    form: str,
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    bits: int,
    activation_bits: int = 8,
) -> Tensor:
    """``bitgemm_linear`` by one of :data:`FORMS`, for tests and measurements.

    Args:
        x: [M, K] on a GPU, in fp32, bf16 or fp16.
        panels: of ``bitgemm_prepare``.
        shape: (N, K).

    Raises:
        RuntimeError: the form does not take these scales, or is not there.
    """
    result: Tensor = torch.ops.megaforge.bitgemm_linear_by(
        x, panels, scale, bias, shape[0], bits, shape[1], activation_bits, form
    )
    return result


def has_wgmma(device: torch.device) -> bool:
    """Whether the compiled code has the form with wgmma for this GPU."""
    return "cuda" in COMPILED and device.type == "cuda" and _has_wgmma(device.index)


@functools.cache
def _has_wgmma(index: int | None) -> bool:
    with torch.cuda.device(index):
        return bool(importlib.import_module("megaforge.kernels._bitgemm_cuda").has_wgmma())


define(
    "bitgemm_linear_by(Tensor x, Tensor prepared, Tensor scale, Tensor? bias, int rows, int bits, int columns, "
    "int activation_bits, str form) -> Tensor",
    lambda x, prepared, scale, bias, rows, *_: x.new_empty(x.shape[0], rows),
)  # fmt: skip

COMPILED = load("bitgemm")
