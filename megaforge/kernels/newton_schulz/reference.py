"""Newton-Schulz iterations written out: each matrix's singular values go towards 1, its singular vectors stay.

All functions take matrices [b, m, n] with m <= n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize(x: Tensor, eps: float) -> Tensor:
    """Each matrix divided by its Frobenius norm, or by ``eps`` where that is larger; norms are taken in fp64, of fp64
    matrices divided by their largest element, for the squares may be beyond what fp64 has."""
    wide, least = x.double(), torch.full((len(x), 1, 1), eps, dtype=torch.float64, device=x.device)
    if x.dtype == torch.float64:
        largest = x.abs().amax((1, 2), keepdim=True)
        largest = torch.where(largest == 0, 1.0, largest)
        wide, least = wide / largest, least / largest
    norms = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True)
    return (wide / torch.maximum(norms, least)).to(torch.promote_types(x.dtype, torch.float32))


def standard(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """X <- a X + (b A + c A A) X with A = X X^T, all in the type of ``x``, which is normalised."""
    for a, b, c in steps:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def gram_polynomial(gram: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """Q [b, m, m] with which the iteration's result is Q X, from ``gram`` = X X^T of a normalised X.

    Each step multiplies X by Z = a I + b R + c R R, so R by Z Z; all of these commute.
    """
    r, eye = gram, torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    q = eye.expand_as(gram)
    for number, (a, b, c) in enumerate(steps):
        z = torch.baddbmm(r, r, r, beta=b, alpha=c) + a * eye
        q = z if number == 0 else torch.bmm(z, q)
        if number + 1 < len(steps):
            r = torch.bmm(torch.bmm(z, r), z)
            r = (r + r.mT) / 2  # rounding makes it unsymmetric, and the next steps enlarge that
    return q


def by_gram(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """What :func:`standard` gives, through :func:`gram_polynomial`: fewer multiplications for long matrices."""
    return torch.bmm(gram_polynomial(torch.bmm(x, x.mT), steps), x)


def by_gram_split(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """:func:`by_gram` for a bf16 ``x``: its long products have bf16 factors and fp32 sums, the Gram matrix's own are
    fp32, and Q is the sum of two bf16 matrices: one would lose what large singular values turn on."""
    wide = x.float()
    q = gram_polynomial(torch.bmm(wide, wide.mT), steps)
    high = q.to(x.dtype)
    low = (q - high).to(x.dtype)
    return torch.bmm(high.float(), wide) + torch.bmm(low.float(), wide)
