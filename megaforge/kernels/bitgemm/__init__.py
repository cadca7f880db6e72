"""Linear layers with packed weights: binary (1 bit), ternary (2 bits) and int4 matrices times 8-bit activations.

:func:`pack` makes the rows that files hold, :func:`prepare` what this device's kernel reads, once; :func:`bit_linear`
quantizes each token to 8 bits, sums integers exactly and multiplies by the scales (BitNet b1.58, arXiv 2402.17764).
:mod:`.reference` is the definition; every implementation gives its results bit for bit, at any number of threads.
Nothing here is differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaforge.kernels.bitgemm import cuda, native, reference
from megaforge.kernels.bitgemm.reference import BITS, quantize_activations
from megaforge.kernels.native import say_uncompiled

__all__ = [
    "BITS", "COMPILED", "TYPES", "Packed", "Prepared", "bit_linear", "bit_product", "dequantize", "pack", "pack_known",
    "prepare", "quantize_activations", "unpack",
]  # fmt: skip

COMPILED = native.COMPILED
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Packed:
    """A matrix [N, K] as files hold it: a weight is its code times its scale.

    Attributes:
        codes: uint8 [N, ceil(K bits / 8)], rows one after the other, the lowest bits of a byte first, unused bits 0.
            Binary: bit 1 is +1, bit 0 is -1. Ternary: code + 1. int4: two's complement, -8 to 7.
        scheme: "binary", "ternary" or "int4".
        shape: (N, K).
        scale: fp32; [] of the matrix, [N] of rows, or [N, K / group] of groups of a row's neighbours.
    """

    codes: Tensor
    scheme: str
    shape: tuple[int, int]
    scale: Tensor

    def __post_init__(self) -> None:
        _check_scheme(self.scheme)
        rows, columns = self.shape
        expected = (rows, -(-columns * BITS[self.scheme] // 8))
        if self.codes.dtype != torch.uint8 or tuple(self.codes.shape) != expected:
            raise ValueError(
                f"a {self.scheme} matrix {rows} x {columns} has codes uint8 {list(expected)}, "
                f"not {self.codes.dtype} {list(self.codes.shape)}"
            )
        _check_scale(self.scale, self.shape)

    @property
    def num_bytes(self) -> int:
        """Of the codes and the scales."""
        return self.codes.numel() + self.scale.numel() * self.scale.element_size()


@dataclass(frozen=True)
class Prepared:
    """A packed matrix as the kernel of its device reads it.

    Attributes:
        panels: the codes; in which order is the device's matter.
        scheme, shape, scale: see :class:`Packed`.
    """

    panels: Tensor
    scheme: str
    shape: tuple[int, int]
    scale: Tensor

    @property
    def num_bytes(self) -> int:
        """Of the codes and the scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.panels, self.scale))


def pack(codes: Tensor, scale: Tensor, scheme: str) -> Packed:
    """int8 codes [N, K] and their scales as rows of packed codes.

    Raises:
        ValueError: a code that the scheme has not (binary has no 0), or shapes that do not fit.
    """
    _check_scheme(scheme)
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"expected int8 codes [N, K], got {codes.dtype} {list(codes.shape)}")
    least, most = reference.RANGES[scheme]
    wrong = (codes < least) | (codes > most)
    wrong = wrong | (codes == 0) if scheme == "binary" else wrong
    if bool(wrong.any()):
        raise ValueError(f"{scheme} codes do not include {int(codes[wrong][0])}")
    return pack_known(codes, scale, scheme)


def pack_known(codes: Tensor, scale: Tensor, scheme: str) -> Packed:
    """:func:`pack` of codes that a quantizer has just made, which are the scheme's: nothing is looked at."""
    rows, columns = codes.shape
    return Packed(reference.pack_codes(codes, scheme), scheme, (rows, columns), scale.float())


def unpack(packed: Packed) -> Tensor:
    """int8 codes [N, K]."""
    return reference.unpack_codes(packed.codes, packed.scheme, packed.shape[1])


def dequantize(packed: Packed) -> Tensor:
    """The weights, fp32 [N, K]."""
    codes, scale = unpack(packed).float(), packed.scale
    if scale.dim() == 2:
        return (codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)
    return codes * (scale.unsqueeze(1) if scale.dim() else scale)


def prepare(packed: Packed) -> Prepared:
    """What :func:`bit_linear` reads on the device of ``packed``, about as large; made once, as a model is loaded. It
    serves this machine alone (its instruction set chooses the layout): never save it."""
    if packed.codes.device.type not in native.COMPILED:
        say_uncompiled("bitgemm", packed.codes.device.type)
    groups = packed.scale.shape[1] if packed.scale.dim() == 2 else 1
    cuda.say_plain(packed.codes, packed.shape[1], groups)
    panels = torch.ops.megaforge.bitgemm_prepare(packed.codes, BITS[packed.scheme], packed.shape[1], groups)
    return Prepared(panels, packed.scheme, packed.shape, packed.scale)


def bit_linear(x: Tensor, weight: Prepared, bias: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    """``x W^T + bias`` with each token of ``x`` quantized to 8 (or 4) bits by :func:`quantize_activations`.

    Args:
        x: [..., K] in fp32, bf16 or fp16.
        bias: [N].

    Returns:
        [..., N] in the type of ``x``. A token with NaN or infinite values gives NaN, and no other does.
    """
    rows, columns = weight.shape
    if x.dtype not in TYPES or x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"expected [..., {columns}] in fp32, bf16 or fp16, got {x.dtype} {list(x.shape)}")
    _check_bits(activation_bits)
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    result: Tensor = native.LINEAR(
        flat, weight.panels, weight.scale, bias, rows, BITS[weight.scheme], columns, activation_bits
    )
    return result if x.dim() == 2 else result.view(*x.shape[:-1], rows)


def bit_product(
    codes: Tensor, worth: Tensor, weight: Prepared, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:func:`bit_linear` of tokens that are quantized already: codes int8 [..., K] and what a code is worth, fp32
    [..., 1]. Where both scales are 1, fp32 results are the integer sums (exact to 2^24), which ranks may add.

    Returns:
        [..., N] in ``dtype``: fp32, bf16 or fp16.
    """
    rows, columns = weight.shape
    if codes.dtype != torch.int8 or codes.shape[-1:] != (columns,) or worth.shape != (*codes.shape[:-1], 1):
        raise ValueError(
            f"expected int8 codes [..., {columns}] and [..., 1], got {codes.dtype} {list(codes.shape)} and "
            f"{list(worth.shape)}"
        )
    if dtype not in TYPES:
        raise ValueError(f"results are fp32, bf16 or fp16, not {dtype}")
    result: Tensor = native.PRODUCT(
        codes.reshape(-1, columns), worth.reshape(-1, 1).float(), weight.panels, weight.scale, bias, rows,
        BITS[weight.scheme], columns, dtype,
    )  # fmt: skip
    return result.view(*codes.shape[:-1], rows)


def _check_scheme(scheme: str) -> None:
    if scheme not in BITS:
        raise ValueError(f"packed weights are {', '.join(BITS)}, not {scheme!r}")


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"activations have 4 or 8 bits, not {bits}")


def _check_scale(scale: Tensor, shape: tuple[int, int]) -> None:
    rows, columns = shape
    fits = scale.dim() == 0 or tuple(scale.shape) == (rows,)
    if scale.dim() == 2 and scale.shape[0] == rows and scale.shape[1] > 0:
        fits = columns % scale.shape[1] == 0
    if scale.dtype != torch.float32 or not fits:
        raise ValueError(
            f"scales of {rows} x {columns} are fp32 [], [{rows}] or [{rows}, {columns} / group], "
            f"not {scale.dtype} {list(scale.shape)}"
        )
