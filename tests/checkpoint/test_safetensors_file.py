"""Our safetensors writer and reader against the package of that name, both ways, and against broken files."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch

from megaforge.checkpoint.safetensors_file import DTYPE_NAMES, SafetensorsFile, Slot, file_order, write_safetensors
from megaforge.errors import DamagedCheckpointError


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{name}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype, name in DTYPE_NAMES.items()
    }
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "großes λ": torch.arange(7)}


def _write(path, tensors):
    slots = sorted((Slot(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()), key=file_order)
    return write_safetensors(path, slots, (tensors[slot.name] for slot in slots))


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name], other[name])
        for name in one
    )


def test_record_is_length_and_hash_of_the_file(tmp_path):
    record = _write(tmp_path / "a", _tensors())
    content = (tmp_path / "a").read_bytes()
    assert record == (len(content), hashlib.sha256(content).hexdigest())


def test_package_reads_ours(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _write(tmp_path / "a", _tensors())
    assert _same(safetensors.load_file(tmp_path / "a"), _tensors())


def test_we_read_the_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(_tensors(), tmp_path / "a")
    file = SafetensorsFile(tmp_path / "a")
    assert _same({slot.name: file.tensor(slot.name) for slot in file.slots()}, _tensors())


def test_data_is_aligned_to_its_type(tmp_path):
    _write(tmp_path / "a", _tensors())
    file = SafetensorsFile(tmp_path / "a")
    for slot in file.slots():
        assert file.tensor(slot.name).data_ptr() % slot.dtype.itemsize == 0


def test_larger_than_a_block_and_not_contiguous(tmp_path):
    tensor = torch.randn(700, 1100).T  # 3 MB, strided
    record = _write(tmp_path / "a", {"x": tensor})
    assert record.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert torch.equal(SafetensorsFile(tmp_path / "a").tensor("x"), tensor)


def test_an_existing_file_is_not_overwritten(tmp_path):
    _write(tmp_path / "a", _tensors())
    with pytest.raises(FileExistsError):
        _write(tmp_path / "a", _tensors())


def _file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _one(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\x80\x04\x95" + b"x" * 40,
        struct.pack("<Q", 1 << 62) + b"{}",
        _file(b"not json", b""),
        _file([], b""),
        _file(_one(), b"\0" * 7),
        _file(_one(), b"\0" * 9),
        _file(_one(1, 9), b"\0" * 9),
        _file(_one(0, 4), b"\0" * 4),
        _file(_one(dtype="PICKLE"), b"\0" * 8),
        _file(_one(shape=(-2, -1)), b"\0" * 8),
        _file(_one() | {"b": _one(4, 12)["a"]}, b"\0" * 12),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="broken"):
        SafetensorsFile(tmp_path / "broken")


def test_a_tensor_that_is_not_there(tmp_path):
    _write(tmp_path / "a", _tensors())
    with pytest.raises(DamagedCheckpointError, match="holds no tensor nothing"):
        SafetensorsFile(tmp_path / "a").tensor("nothing")
