"""The operators ``torch.ops.megaforge.bitgemm_*``. Their code is in ``csrc/bitgemm``; elsewhere they are
:mod:`.reference`'s.

A prepared matrix is whatever ``bitgemm_prepare`` of its device makes of the stored rows; its type and shape tell the
layouts apart; the plain form keeps the rows, uint8 [N, bytes]. ``groups``: of columns, each with scales of its own; 1
where a row has one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaforge.kernels.bitgemm import cuda, reference
from megaforge.kernels.native import define

_SCHEMES = {bits: scheme for scheme, bits in reference.BITS.items()}


def _prepare(packed: Tensor, bits: int, columns: int, groups: int) -> Tensor:
    return packed.clone()


def _prepared(packed: Tensor, bits: int, columns: int, groups: int) -> Tensor:
    if packed.device.type == "cuda" and "cuda" in COMPILED:
        return packed.new_empty(cuda.panel_shape(packed.shape[0], bits, columns), dtype=torch.int32)
    return packed.new_empty(packed.shape)


def _linear(
    x: Tensor, prepared: Tensor, scale: Tensor, bias: Tensor | None, bits: int, columns: int, activation_bits: int
) -> Tensor:
    codes, worth = reference.quantize_activations(x, activation_bits)
    return _product(codes, worth, prepared, scale, bias, bits, columns, x.dtype)


def _product(
    codes: Tensor,
    worth: Tensor,
    prepared: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = reference.unpack_codes(prepared, _SCHEMES[bits], columns)
    return reference.product(codes, worth, weight, scale, bias, dtype)


define(
    "bitgemm_prepare(Tensor packed, int bits, int columns, int groups) -> Tensor",
    _prepared, _prepare,
)  # fmt: skip
define(
    "bitgemm_linear(Tensor x, Tensor prepared, Tensor scale, Tensor? bias, int rows, int bits, int columns, "
    "int activation_bits) -> Tensor",
    lambda x, prepared, scale, bias, rows, *_: x.new_empty(x.shape[0], rows),
    lambda x, prepared, scale, bias, rows, *rest: _linear(x, prepared, scale, bias, *rest),
)  # fmt: skip
define(
    "bitgemm_product(Tensor codes, Tensor worth, Tensor prepared, Tensor scale, Tensor? bias, int rows, int bits, "
    "int columns, ScalarType dtype) -> Tensor",
    lambda codes, worth, prepared, scale, bias, rows, bits, columns, dtype: worth.new_empty(
        codes.shape[0], rows, dtype=dtype
    ),
    lambda codes, worth, prepared, scale, bias, rows, *rest: _product(codes, worth, prepared, scale, bias, *rest),
)  # fmt: skip

COMPILED = cuda.COMPILED
# Calls of a packet (torch.ops.megaforge.NAME) look for the overload each time: microseconds, where a product has few.
LINEAR = torch.ops.megaforge.bitgemm_linear.default
PRODUCT = torch.ops.megaforge.bitgemm_product.default
