"""Products of whole numbers, exact where the type can hold the sums."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megaforge.kernels.bitgemm import COMPILED, Prepared, bit_product
from megaforge.kernels.grouped_mm import Runs
from megaforge.parallel.linear_op import PLAIN
from megaforge.quant.quantizers import wide


def code_product(codes: Tensor, matrix: Tensor, dtype: torch.dtype, runs: Runs | None = None) -> Tensor:
    """``codes matrix^T``, summed exactly: as int8 where the machine multiplies them, else in fp32 (fp64 in an fp64
    model), where sums are exact up to 2^24. On a GPU experts of 16-bit models, and what its int8 product does not take,
    are multiplied as bf16, which holds the codes and rounds the sums.

    Args:
        codes: whole numbers [..., K]: int8, or another type up to 255 in size.
        matrix: likewise [N, K], or [E, N, K] with ``runs``.
        dtype: of the model.

    Returns:
        [..., N], fp32 or fp64.
    """
    kept = wide(dtype)
    both_int8 = codes.dtype == matrix.dtype == torch.int8
    if both_int8 and dtype != torch.float64 and runs is None and _takes_int8(codes, matrix):
        return torch._int_mm(codes.flatten(0, -2), matrix.t()).to(kept).unflatten(0, codes.shape[:-1])
    if both_int8 and dtype != torch.float64 and runs is not None and codes.device.type == "cpu" and _vnni():
        pairs = zip(codes.split(runs.counts), matrix, strict=True)
        return torch.cat([torch._int_mm(rows, one.t()) for rows, one in pairs]).to(kept)
    narrow = codes.device.type == "cuda" and dtype == torch.bfloat16
    common = torch.bfloat16 if narrow else kept
    return PLAIN.forward((codes.to(common),), matrix.to(common), None, runs).to(kept)


def multiplies_packed(device: torch.device) -> bool:
    """Whether ``device`` is a CPU whose packed kernels are compiled, and fast."""
    return device.type == "cpu" and "cpu" in COMPILED and _vnni()


def unscaled_product(codes: Tensor, matrix: Prepared) -> Tensor:
    """The sums alone, fp32 [..., N], of int8 codes [..., K]."""
    unscaled = dataclasses.replace(matrix, scale=torch.ones_like(matrix.scale))
    return bit_product(codes, codes.new_ones((*codes.shape[:-1], 1), dtype=torch.float32), unscaled)


def step_by_row(step: Tensor, rows: int) -> Tensor:
    """Steps [1, 1], [N, 1] or [N, K / group, 1] as the packed kernels take them: fp32 [N] or [N, K / group]."""
    step = step.float().squeeze(-1)
    return step.contiguous() if step.dim() == 2 else step.view(-1).expand(rows).contiguous()


def _vnni() -> bool:
    """Whether this CPU sums int8 products in 32 bits: others saturate in 16."""
    return bool(torch.cpu._is_vnni_supported())


def _takes_int8(codes: Tensor, matrix: Tensor) -> bool:
    if codes.device.type == "cpu":
        return _vnni()
    # cuBLASLt's conditions
    rows = codes.numel() // codes.shape[-1]
    return codes.device.type == "cuda" and rows > 16 and all(size % 8 == 0 for size in matrix.shape)
