"""Walsh-Hadamard rotation of activations in blocks: it spreads outliers before they are quantized
(BitNet v2, arXiv 2504.18415)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The symmetric, orthonormal matrix of Sylvester [size, size]; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix * size**-0.5).to(dtype)


def rotate(x: Tensor, size: int) -> Tensor:
    """Each block of ``size`` neighbours of the last dimension times the matrix, which is its own inverse; [..., K] ->
    [..., K]. ``size`` divides K."""
    return (x.unflatten(-1, (-1, size)) @ hadamard_matrix(size, x.dtype, x.device)).flatten(-2)
