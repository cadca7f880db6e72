"""The GGUF file format, written and read (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3).

Little-endian: a magic number, counts, key-value pairs, descriptions of tensors, then their bytes, each aligned to 32.
The package of that name does not know all block types that it would have to write.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaforge.errors import UserError

ALIGNMENT = 32
F32, F16, BF16 = 0, 1, 30  # ggml's numbers of plain types
PLAIN = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class GGUFTensor(NamedTuple):
    """A tensor of the file.

    Attributes:
        shape: of its values, rows last but one.
        kind: ggml's number of its type.
        data: its bytes, as any tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    data: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> tuple[int, bytes]:
    """(type, bytes) of a value: whole numbers are uint32, those of lists int32."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    if all(isinstance(one, int) for one in value):
        return _ARRAY, struct.pack("<IQ", _INT32, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_string, value))


def write_gguf(file: Path, fields: Mapping[str, Any], tensors: Sequence[GGUFTensor]) -> int:
    """Writes ``file``, which must not exist; the disk need not have it yet.

    Args:
        fields: text, numbers, truth values, or lists of whole numbers or texts, by key.

    Returns:
        Its bytes.

    Raises:
        OSError: it cannot be written.
    """
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        kind, raw = _value(value)
        head += [_string(key), struct.pack("<I", kind), raw]
    offset = 0
    for one in tensors:
        dims = one.shape[::-1]
        head += [_string(one.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, one.kind, offset)]
        offset += -(-one.nbytes // ALIGNMENT) * ALIGNMENT
    text = b"".join(head)
    with open(file, "xb") as stream:
        stream.write(text + bytes(-len(text) % ALIGNMENT))
        for one in tensors:
            raw_bytes: np.ndarray[Any, Any] = one.data.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            stream.write(raw_bytes.data)
            stream.write(bytes(-one.nbytes % ALIGNMENT))
        return stream.tell()


_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # type -> struct's
_MOST = 1 << 32  # entries of a list, bytes of a text: more is damage


class GGUFSlot(NamedTuple):
    """Where a tensor lies: its shape, rows last but one; ggml's number of its type; its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


class GGUFFile:
    """A file of versions 2 and 3, mapped into memory.

    Attributes:
        fields: what it says of its model, by key.
        slots: its tensors, by name.

    Raises:
        UserError: it cannot be read, or is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as stream:
                self._read_head(stream)
            self._bytes: np.memmap[Any, Any] = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise UserError(f"{path}: it cannot be read ({error.strerror})") from error
        except (struct.error, UnicodeDecodeError, KeyError, ValueError, MemoryError, OverflowError) as error:
            raise UserError(
                f"{path}: it is no GGUF file, or a damaged one ({error or type(error).__name__})"
            ) from error

    def _read_head(self, stream: BinaryIO) -> None:
        magic, version, tensors, fields = struct.unpack("<4sIQQ", stream.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}; known are b'GGUF', versions 2 and 3")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            key = _read_text(stream)
            self.fields[key] = _read_value(stream, *struct.unpack("<I", stream.read(4)))
        found = []
        for _ in range(tensors):
            name, [dims] = _read_text(stream), struct.unpack("<I", stream.read(4))
            *shape, kind, offset = struct.unpack(f"<{dims}QIQ", stream.read(8 * dims + 12))
            found.append((name, tuple(shape[::-1]), kind, offset))
        aligned = int(self.fields.get("general.alignment", ALIGNMENT))
        start = -(-stream.tell() // aligned) * aligned
        self.slots = {name: GGUFSlot(shape, kind, start + offset) for name, shape, kind, offset in found}

    def content(self, name: str, nbytes: int) -> Tensor:
        """The bytes of a tensor: uint8 [nbytes], a copy.

        Raises:
            UserError: the file ends before them.
        """
        start = self.slots[name].start
        if start + nbytes > len(self._bytes):
            raise UserError(f"{self.path}: it ends within {name}; it is not whole")
        return torch.from_numpy(np.array(self._bytes[start : start + nbytes]))


def _read_text(stream: BinaryIO) -> str:
    [size] = struct.unpack("<Q", stream.read(8))
    raw = stream.read(size) if size < _MOST else b""
    if len(raw) != size:
        raise ValueError("a text does not end")
    return raw.decode("utf-8")


def _read_value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _read_text(stream)
    if kind != _ARRAY:
        form = "<" + _NUMBERS[kind]
        [value] = struct.unpack(form, stream.read(struct.calcsize(form)))
        return value
    inner, count = struct.unpack("<IQ", stream.read(12))
    if count >= _MOST:
        raise ValueError("a list does not end")
    if inner in (_STRING, _ARRAY):
        return [_read_value(stream, inner) for _ in range(count)]
    form = f"<{count}{_NUMBERS[inner]}"
    return list(struct.unpack(form, stream.read(struct.calcsize(form))))
