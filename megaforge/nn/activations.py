"""An FFN's nonlinearities, by the names that ``--activation`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from megaforge.kernels.pointwise import gated_squared_relu, squared_relu, swiglu, weighted_activation

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu2": squared_relu,
    "gated_relu2": gated_squared_relu,
    "swiglu": swiglu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_exact": F.gelu,
}


def activate(kind: str, x: Tensor) -> Tensor:
    """The FFN's nonlinearity: ``relu2`` (arXiv 2109.08668), ``gelu`` in its tanh form or ``gelu_exact`` by the error
    function (arXiv 1606.08415), ``swiglu`` (arXiv 2002.05202) or ``gated_relu2``, relu2 of the gate times the other
    half (BitNet b1.58 2B4T, arXiv 2504.12285).

    Args:
        kind: as ``--activation``.
        x: [..., f]; for swiglu and gated_relu2 [..., 2f], gate before up.

    Returns:
        [..., f].
    """
    return ACTIVATIONS[kind](x)


# Those that the kernel of weighted rows has.
_WEIGHTED: Mapping[str, Mapping[str, bool]] = {
    "relu2": {"squared": True, "gated": False},
    "gated_relu2": {"squared": True, "gated": True},
    "swiglu": {"squared": False, "gated": True},
}


def activate_weighted(kind: str, x: Tensor, weights: Tensor) -> Tensor:
    """:func:`activate` of rows [R, f] or [R, 2f], each times its weight [R], in the dtype of ``x``."""
    if kind in _WEIGHTED:
        return weighted_activation(x, weights, **_WEIGHTED[kind])
    return activate(kind, x) * weights.to(x.dtype).unsqueeze(1)
