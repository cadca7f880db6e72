"""The block types of ggml (https://github.com/ggml-org/ggml, src/ggml-common.h) that hold weights of one or two bits.

A row of weights is cut into blocks, each of which has its codes and one fp16 scale. The bytes are those that ggml and
llama.cpp read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class BlockType(ABC):
    """One type of block.

    Attributes:
        name: ggml's.
        number: ggml's number of the type, as GGUF files have it.
        file_type: llama.cpp's number of a file whose matrices are mostly of this type (``general.file_type``).
        weights: in one block.
        code_bytes: of one block, beside the two of its scale.
        scale_first: whether the scale stands before the codes.
        codes: the least and the largest code.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    file_type: ClassVar[int]
    weights: ClassVar[int]
    code_bytes: ClassVar[int]
    scale_first: ClassVar[bool]
    codes: ClassVar[tuple[int, int]] = (-1, 1)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights."""
        return columns // self.weights * (self.code_bytes + 2)

    def encode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """
        Args:
            codes: int8 [N, K].
            scale: that multiplies them: fp32, broadcasts to [N, 1]; stored as fp16.

        Returns:
            uint8 [N, row_bytes(K)].

        Raises:
            ValueError: K is not a multiple of the block, a code is not one of the type's, or a scale is not finite or
                is lost in fp16.
        """
        rows, columns = codes.shape
        if columns % self.weights:
            raise ValueError(f"{self.name} has blocks of {self.weights} weights, and a row has {columns}")
        least, most = self.codes
        one_bit = self.weights == 8 * self.code_bytes
        if codes.numel() and bool(((codes < least) | (codes > most) | ((codes == 0) if one_bit else False)).any()):
            raise ValueError(f"{self.name} has the codes {'-1 and 1' if one_bit else f'{least} to {most}'}, no others")
        stored = scale.to(torch.float16)
        if not bool(stored.isfinite().all()) or bool(((stored == 0) & (scale != 0)).any()):
            raise ValueError(f"{self.name} stores scales as fp16, and {_worst(scale):g} is none of its numbers")
        blocks = codes.reshape(-1, self.weights).to(torch.int16) + 1
        scales = stored.expand(rows, 1).repeat_interleave(columns // self.weights, 0).contiguous().view(torch.uint8)
        packed = self._pack(blocks).to(torch.uint8)
        parts = [scales, packed] if self.scale_first else [packed, scales]
        return torch.cat(parts, dim=1).reshape(rows, self.row_bytes(columns))

    def decode(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scales fp32 [N, K / weights] of uint8 [N, bytes]."""
        rows = data.shape[0]
        blocks = data.reshape(-1, self.code_bytes + 2)
        scales, packed = blocks.split([2, self.code_bytes] if self.scale_first else [self.code_bytes, 2], dim=1)
        if not self.scale_first:
            scales, packed = packed, scales
        codes = (self._unpack(packed.to(torch.int16)) - 1).to(torch.int8)
        return codes.reshape(rows, -1), scales.contiguous().view(torch.float16).float().reshape(rows, -1)

    @abstractmethod
    def _pack(self, blocks: Tensor) -> Tensor:
        """int16 [blocks, weights] of codes + 1 -> [blocks, code_bytes] below 256."""

    @abstractmethod
    def _unpack(self, data: Tensor) -> Tensor:
        """The inverse."""


def _worst(scale: Tensor) -> float:
    finite = scale[scale.isfinite()]
    return float("nan") if finite.numel() < scale.numel() else float(finite.abs().max())


def _bit_fields(values: Tensor, bits: int) -> Tensor:
    """[..., n, m] of small numbers -> [..., m]: the first of n in the lowest bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int16).unsqueeze(-1)
    return (values << shifts).sum(-2, dtype=torch.int16)


def _fields(data: Tensor, bits: int) -> Tensor:
    """[..., m] -> [..., n, m], the inverse of :func:`_bit_fields`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int16).unsqueeze(-1)
    return (data.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)


class TQ2_0(BlockType):
    """Ternary, 2.0625 bits a weight: a byte has four weights that are 32 apart."""

    name, number, file_type = "TQ2_0", 35, 37
    weights, code_bytes, scale_first = 256, 64, False

    def _pack(self, blocks: Tensor) -> Tensor:
        return _bit_fields(blocks.view(-1, 2, 4, 32), 2).flatten(1)

    def _unpack(self, data: Tensor) -> Tensor:
        return _fields(data.reshape(-1, 2, 32), 2).flatten(1)


class TQ1_0(BlockType):
    """Ternary, 1.6875 bits a weight: a byte has five weights as digits to base 3, which a product with 3 brings out in
    the bits above it."""

    name, number, file_type = "TQ1_0", 34, 36
    weights, code_bytes, scale_first = 256, 54 - 2, False
    _runs = ((5, 32), (5, 16), (4, 4))  # digits in a byte, bytes

    def _pack(self, blocks: Tensor) -> Tensor:
        packed = []
        for part, (digits, width) in zip(blocks.split([n * m for n, m in self._runs], dim=1), self._runs, strict=True):
            powers = torch.tensor([81, 27, 9, 3, 1][:digits], dtype=torch.int16).unsqueeze(-1)
            number = (part.reshape(-1, digits, width) * powers).sum(1, dtype=torch.int32)
            packed.append((number * 256 + 242) // 243)
        return torch.cat(packed, dim=1)

    def _unpack(self, data: Tensor) -> Tensor:
        codes = []
        for part, (digits, _) in zip(data.split([m for _, m in self._runs], dim=1), self._runs, strict=True):
            powers = torch.tensor([1, 3, 9, 27, 81][:digits], dtype=torch.int16).unsqueeze(-1)
            fractions = (part.unsqueeze(1) * powers) & 255
            codes.append(((fractions * 3) >> 8).flatten(1))
        return torch.cat(codes, dim=1)


class Q2_0(BlockType):
    """Two bits a weight, 2.25 with the scale: a byte has four weights that follow each other. ggml has the codes -1 to
    2; products of ternary weights need three of them."""

    name, number, file_type = "Q2_0", 42, 41
    weights, code_bytes, scale_first, codes = 64, 16, True, (-1, 2)

    def _pack(self, blocks: Tensor) -> Tensor:
        return _bit_fields(blocks.view(-1, 16, 4).transpose(1, 2), 2)

    def _unpack(self, data: Tensor) -> Tensor:
        return _fields(data, 2).transpose(1, 2).flatten(1)


class Q1_0(BlockType):
    """One bit a weight, 1.125 with the scale; a one is +1."""

    name, number, file_type = "Q1_0", 41, 40
    weights, code_bytes, scale_first = 128, 16, True

    def _pack(self, blocks: Tensor) -> Tensor:
        return _bit_fields((blocks >> 1).view(-1, 16, 8).transpose(1, 2), 1)

    def _unpack(self, data: Tensor) -> Tensor:
        return _fields(data, 1).transpose(1, 2).flatten(1) * 2


BLOCK_TYPES: dict[str, BlockType] = {kind.name: kind for kind in (TQ1_0(), TQ2_0(), Q1_0(), Q2_0())}
