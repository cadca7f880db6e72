"""Blocks of ggml: bytes by hand-written loops as ggml's C has them, and the ``gguf`` package's own reader."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from megaforge.quant.formats.ggml_blocks import BLOCK_TYPES

COLUMNS = 512


def codes_of(name: str, rows: int = 3) -> torch.Tensor:
    codes = torch.randint(-1, 2, (rows, COLUMNS), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    codes[0, :256], codes[1, :256] = 1, -1
    return torch.where(codes == 0, 1, codes) if name == "Q1_0" else codes


def as_in_c(name: str, w: list[int], d: float) -> bytes:
    """One block, as quantize_row_*_ref of ggml-quants.c writes it."""
    scale = np.float16(d).tobytes()
    if name == "TQ2_0":
        out = bytearray(64)
        for j in range(0, 64, 32):
            for m in range(32):
                out[j + m] = sum((w[4 * j + m + 32 * n] + 1) << (2 * n) for n in range(4))
        return bytes(out) + scale
    if name == "TQ1_0":
        out, at = bytearray(), 0
        for width, digits in ((32, 5), (16, 5), (4, 4)):
            for m in range(width):
                q = 0
                for n in range(digits):
                    q = q * 3 + w[at + m + n * width] + 1
                q *= 3 ** (5 - digits)
                out.append((q * 256 + 242) // 243)
            at += width * digits
        return bytes(out) + scale
    if name == "Q2_0":
        return scale + bytes(sum((w[4 * j + n] + 1) << (2 * n) for n in range(4)) for j in range(16))
    return scale + bytes(sum((w[8 * j + n] > 0) << n for n in range(8)) for j in range(16))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_bytes_are_ggmls(name: str) -> None:
    kind, codes, scale = BLOCK_TYPES[name], codes_of(name), torch.tensor([[0.5], [3.0], [0.1]])
    data = kind.encode(codes, scale)
    assert data.shape == (3, kind.row_bytes(COLUMNS)) and data.dtype == torch.uint8
    expected = b"".join(
        as_in_c(name, row[start : start + kind.weights], float(d))
        for row, d in zip(codes.tolist(), scale, strict=True)
        for start in range(0, COLUMNS, kind.weights)
    )
    assert data.numpy().tobytes() == expected
    again, scales = kind.decode(data)
    assert torch.equal(again, codes) and torch.equal(scales, scale.half().float().expand_as(scales))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_gguf_reads_them(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs gguf, of the test extra")
    import gguf

    kind, codes, scale = BLOCK_TYPES[name], codes_of(name), torch.tensor(0.25)
    if not hasattr(gguf.GGMLQuantizationType, name):
        pytest.skip(f"this gguf does not know {name}")
    number = gguf.GGMLQuantizationType[name]
    assert int(number) == kind.number and gguf.GGML_QUANT_SIZES[number] == (kind.weights, kind.code_bytes + 2)
    data = kind.encode(codes, scale).numpy()
    values = (codes.float() * scale).numpy()
    if number in gguf.quants._type_traits:  # of Q1_0 it knows the size alone
        assert np.array_equal(gguf.quants.dequantize(data, number), values)
        assert np.array_equal(gguf.quants.quantize(values, number), data)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    kind, codes = BLOCK_TYPES[name], codes_of(name)
    with pytest.raises(ValueError, match="blocks of"):
        kind.encode(codes[:, :-1], torch.tensor(1.0))
    with pytest.raises(ValueError, match="codes"):
        kind.encode(codes * 3, torch.tensor(1.0))
    for scale in (1e-9, 1e6, float("nan")):
        with pytest.raises(ValueError, match="fp16"):
            kind.encode(codes, torch.tensor(scale))
    assert kind.encode(codes[:0], torch.tensor(1.0)).shape == (0, kind.row_bytes(COLUMNS))
    if name == "Q1_0":
        with pytest.raises(ValueError, match="codes"):
            kind.encode(torch.zeros_like(codes), torch.tensor(1.0))
