"""GGUF as bytes, and as the ``gguf`` package reads it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from megaforge.checkpoint.gguf_file import ALIGNMENT, BF16, F32, GGUFTensor, write_gguf

FIELDS = {
    "general.architecture": "llama",
    "a.count": 3,
    "a.rate": 0.5,
    "a.is": True,
    "a.texts": ["x", "äöü", ""],
    "a.numbers": [1, -2],
}


def tensors() -> list[GGUFTensor]:
    first, second = torch.arange(15.0).view(3, 5), torch.ones(2, dtype=torch.bfloat16)
    return [GGUFTensor("first", (3, 5), F32, first), GGUFTensor("second.weight", (2,), BF16, second)]


def test_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    size = write_gguf(file, FIELDS, tensors())
    data = file.read_bytes()
    assert len(data) == size and data[:4] == b"GGUF" and struct.unpack("<IQQ", data[4:24]) == (3, 2, len(FIELDS))
    assert size % ALIGNMENT == 0 and data[-ALIGNMENT:] == b"\x80\x3f\x80\x3f" + bytes(28)
    assert data[-2 * ALIGNMENT - 32 : -ALIGNMENT] == np.arange(15, dtype="<f4").tobytes() + bytes(4)
    with pytest.raises(FileExistsError):
        write_gguf(file, FIELDS, [])


def test_gguf_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra 'test'")
    write_gguf(tmp_path / "x.gguf", FIELDS, tensors())
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert {name: field.contents() for name, field in reader.fields.items() if name in FIELDS} == FIELDS
    first, second = reader.tensors
    assert first.name == "first" and np.array_equal(first.data, np.arange(15.0, dtype=np.float32).reshape(3, 5))
    assert second.tensor_type.name == "BF16" and tuple(second.shape) == (2,)
