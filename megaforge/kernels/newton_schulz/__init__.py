"""Orthogonalization of matrices by Newton-Schulz iterations, as Muon needs it (Jordan et al., 2024).

A polynomial of X X^T takes all singular values of X near 1 in a few matrix products. :mod:`.reference` writes the
iterations out, :mod:`.coefficients` has the published polynomials; ``csrc/newton_schulz`` has compiled code, which
computes products that are symmetric by half. It does not depend on the number of threads, and each matrix of a batch
comes out as it does alone, bit for bit; the products of torch (fp64, GPUs, no compiled code) do not promise that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.kernels.native import say_uncompiled
from megaforge.kernels.newton_schulz import cuda, native, reference
from megaforge.kernels.newton_schulz.coefficients import COEFFICIENT_TYPES, Triple, coefficients

__all__ = ["COEFFICIENT_TYPES", "coefficients", "gram_polynomial", "newton_schulz"]

ALGORITHMS = ("auto", "standard", "gram")
PRECISIONS = ("auto", "bf16", "fp32", "fp64", "split")
LONG = 4  # n/m from which the Gram way is taken
_TYPES = {"bf16": torch.bfloat16, "split": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficient_type: str = "quintic",
    algorithm: str = "auto",
    precision: str = "auto",
    eps: float = 1e-7,
    custom: Sequence[Triple] | None = None,
) -> Tensor:
    """Each matrix with its singular values near 1 (how near: the coefficients say) and its singular vectors.

    Args:
        x: [m, n] or [b, m, n]. A matrix of zeros gives zeros; one with NaN or infinite values gives NaN, and no other
            does.
        coefficient_type, steps, custom: see :func:`coefficients`.
        algorithm: ``standard`` iterates on X, ``gram`` on X X^T and multiplies X once, which takes fewer products the
            longer a matrix is. ``auto``: gram from a side ratio of 4 on for the precisions that it is safe in; on GPUs
            for fp32 alone.
        precision: of the products: ``bf16`` (with ``standard``), ``split`` (with ``gram``: long products have bf16
            factors, the others are fp32), ``fp32``, ``fp64``. ``auto``: fp64 for fp64 matrices, else bf16 or split.
        eps: the least norm that a matrix is divided by.

    Returns:
        In the shape and type of ``x``; a new tensor.

    Raises:
        UserError: an unknown name, or an algorithm and a precision that do not go together.
    """
    triples = coefficients(coefficient_type, steps, custom)
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"expected matrices [m, n] or [b, m, n], got {x.dtype} {list(x.shape)}")
    stack = x.unsqueeze(0) if x.dim() == 2 else x
    tall = stack.shape[1] > stack.shape[2]
    stack = stack.mT if tall else stack
    algorithm, precision = _choose(stack, algorithm, precision)
    if stack.numel() == 0:
        return x.clone()
    gram, narrow = algorithm == "gram", _TYPES[precision] == torch.bfloat16
    if narrow and not gram and cuda.on_gpu(x):
        kept = reference.normalize(stack, eps).bfloat16()
        result = (cuda.steps_by_cuda if cuda.takes(kept) else reference.standard)(kept, triples)
    else:
        if x.device.type not in native.COMPILED and x.device.type == "cpu":
            say_uncompiled("newton_schulz", "cpu")
        wide = stack.to(torch.float64 if precision == "fp64" else torch.float32).contiguous()
        result = native.orthogonalize(wide, triples, gram=gram, narrow=narrow, eps=eps)
    return (result.mT if tall else result).to(x.dtype).reshape(x.shape).contiguous()


def gram_polynomial(
    gram: Tensor, *, steps: int = 5, coefficient_type: str = "quintic", custom: Sequence[Triple] | None = None
) -> Tensor:
    """Q with which Q X is what :func:`newton_schulz` makes of a normalised X [b, m, n], m <= n: for who has X in parts.

    Args:
        gram: [b, m, m] fp32 or fp64, X X^T.

    Returns:
        [b, m, m].

    Raises:
        ValueError: another type or shape; the polynomial of a bf16 matrix diverges.
    """
    if gram.dtype not in (torch.float32, torch.float64) or gram.dim() != 3 or gram.shape[1] != gram.shape[2]:
        raise ValueError(f"expected Gram matrices [b, m, m] in fp32 or fp64, got {gram.dtype} {list(gram.shape)}")
    return native.polynomial(gram, coefficients(coefficient_type, steps, custom))


def _choose(x: Tensor, algorithm: str, precision: str) -> tuple[str, str]:
    """What ``auto`` means for ``x`` [b, m, n], m <= n."""
    for name, value, known in (("algorithm", algorithm, ALGORITHMS), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UserError(f"{name} {value!r} of Newton-Schulz iterations: use one of {', '.join(known)}")
    if (algorithm, precision) in (("gram", "bf16"), ("standard", "split")):
        raise UserError(
            f"Newton-Schulz iterations: algorithm {algorithm!r} does not go with precision {precision!r}; the Gram way "
            "diverges in bf16, and 'split' is for it alone"
        )
    if precision == "auto" and x.dtype == torch.float64:
        precision = "fp64"
    if algorithm == "auto":
        long = x.shape[2] >= LONG * x.shape[1]
        # A GPU's fp32 products take longer than the bf16 ones that they save.
        safe = ("fp32",) if x.device.type == "cuda" else ("auto", "fp32")
        algorithm = "gram" if precision == "split" or (long and precision in safe) else "standard"
    if precision == "auto":
        precision = "split" if algorithm == "gram" else "bf16"
    return algorithm, precision
