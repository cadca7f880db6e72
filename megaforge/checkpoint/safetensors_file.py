"""The safetensors file format, written as a stream that is hashed on its way to the disk, and read through mmap.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header, a JSON header
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` padded with spaces to a multiple of 8, then the raw
row-major bytes without holes. The package of that name serialises a whole file before it can be hashed; here each
tensor goes from its own memory through the hash to the file, a block at a time.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megaforge.checkpoint.encryption import EncryptedFile, Encryptor
from megaforge.checkpoint.hashed_file import FileRecord, HashedFile
from megaforge.errors import DamagedCheckpointError
from megaforge.json_text import parse_json

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_HEADER = 100_000_000  # the safetensors package's own bound


class Slot(NamedTuple):
    """One tensor's place in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """As the format has it: ``BF16``."""
        return DTYPE_NAMES[self.dtype]


def file_order(slot: Slot) -> tuple[int, str]:
    """Sort key of the slots of one file: wide types first, so that every tensor is aligned without holes."""
    return -slot.dtype.itemsize, slot.name


def _encode_header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for slot in slots:
        if slot.name in entries:
            raise ValueError(f"two tensors of one file are both called {slot.name}")
        entries[slot.name] = {
            "dtype": DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [begin, begin + slot.nbytes],
        }
        begin += slot.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major bytes of ``tensor``: its own memory when that is contiguous and on the CPU, else a copy."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(
    path: Path,
    slots: Sequence[Slot],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    seal: Callable[[int], Encryptor] | None = None,
) -> FileRecord:
    """Writes and fsyncs ``path``; ``tensors`` is consumed one at a time, in the order of ``slots``.

    Args:
        metadata: goes into the header.
        seal: encrypts what is written; it is told how many bytes there are.

    Returns:
        Length and hash of the file, as it lies there.

    Raises:
        OSError: the file cannot be written (disk full among others); the half-written file is left behind.
        ValueError: a tensor is not what its slot says.
    """
    header = _encode_header(slots, metadata or {})
    size = len(header) + sum(slot.nbytes for slot in slots)
    encryptor = None if seal is None else seal(size)
    with HashedFile(path, size) as file:

        def take(data: memoryview) -> None:
            if encryptor is None:
                return file.write(data)
            for chunk in encryptor.update(data):
                file.write(memoryview(chunk))

        if encryptor is not None:
            file.write(memoryview(encryptor.head))
        take(memoryview(header))
        for slot, tensor in zip(slots, tensors, strict=True):
            if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
                raise ValueError(
                    f"{slot.name}: {tensor.dtype} {tuple(tensor.shape)} in a slot for {slot.dtype} {slot.shape}"
                )
            take(_raw_bytes(tensor))
        if encryptor is not None:
            file.write(memoryview(encryptor.finish()))
        return file.finish()


class SafetensorsFile:
    """A memory-mapped safetensors file, or an encrypted one. Reading writes nothing and works on read-only media.

    Attributes:
        metadata: the strings that its header carries beside the tensors.

    Raises:
        DamagedCheckpointError: it is not a safetensors file, or its header contradicts its length.
    """

    def __init__(self, path: Path, encrypted: EncryptedFile | None = None) -> None:
        """``encrypted``: reads ``path`` where it is."""
        self.path = path
        self.metadata: dict[str, str] = {}
        self._encrypted = encrypted
        self._map: mmap.mmap | None = None
        if encrypted is not None:
            self._data_start = self._read_header(encrypted.size, encrypted.read)
            return
        with open(path, "rb") as file:

            def read(begin: int, length: int) -> bytes:
                file.seek(begin)
                return file.read(length)

            self._data_start = self._read_header(os.fstat(file.fileno()).st_size, read)
            # A private mapping: torch warns about tensors over read-only buffers, and nobody writes to these.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _read_header(self, size: int, read: Callable[[int, int], bytes | bytearray]) -> int:
        """Takes in the header of a file of ``size`` bytes; returns where its data begin."""
        prefix = read(0, 8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise DamagedCheckpointError(
                f"{self.path}: not a safetensors file (header of {length} bytes in a file of {size})"
            )
        self._header = self._parse(bytes(read(8, length)), size - 8 - length)
        return 8 + length

    def _parse(self, text: bytes, data_bytes: int) -> dict[str, tuple[Slot, int]]:
        try:
            entries = parse_json(text)
            self.metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
            slots: list[tuple[int, int, Slot]] = []
            for name, entry in entries.items():
                begin, end = map(int, entry["data_offsets"])
                slots.append((begin, end, Slot(str(name), DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DamagedCheckpointError(
                f"{self.path}: unreadable safetensors header ({type(error).__name__}: {error})"
            ) from error
        header: dict[str, tuple[Slot, int]] = {}
        expected = 0
        for begin, end, slot in sorted(slots, key=lambda entry: entry[:2]):
            if begin != expected or end - begin != slot.nbytes or any(size < 0 for size in slot.shape):
                raise DamagedCheckpointError(f"{self.path}: tensor {slot.name} claims bytes {begin} to {end}")
            header[slot.name] = (slot, begin)
            expected = end
        if expected != data_bytes:
            raise DamagedCheckpointError(f"{self.path}: {data_bytes} bytes of data where the header lists {expected}")
        return header

    def slots(self) -> list[Slot]:
        """What the file holds, in file order."""
        return [slot for slot, _ in self._header.values()]

    def slot(self, name: str) -> Slot:
        """Type and shape of the tensor called ``name``.

        Raises:
            DamagedCheckpointError: the file has no such tensor.
        """
        return self._place(name)[0]

    def _place(self, name: str) -> tuple[Slot, int]:
        if name not in self._header:
            raise DamagedCheckpointError(f"{self.path}: holds no tensor {name}")
        slot, begin = self._header[name]
        return slot, self._data_start + begin

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Copies the tensor called ``name`` to ``target``, of its shape; where that has the same bytes, without a stop
        on the way: a mapped file would be read in small pieces.

        Raises:
            DamagedCheckpointError: the file has no such tensor, or ends within it.
        """
        slot, begin = self._place(name)
        if target.dtype != slot.dtype or target.device.type != "cpu" or not (slot.nbytes and target.is_contiguous()):
            target.copy_(self.tensor(name))
            return
        left = _raw_bytes(target)
        if self._encrypted is not None:
            self._encrypted.read_into(begin, left)
            return
        with open(self.path, "rb", buffering=0) as file:
            file.seek(begin)
            while left:
                count = file.readinto(left)
                if not count:
                    raise DamagedCheckpointError(f"{self.path}: ends within the tensor {name}")
                left = left[count:]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called ``name`` as a view of the mapped file; of an encrypted one in memory of its own.

        Raises:
            DamagedCheckpointError: the file has no such tensor.
        """
        slot, begin = self._place(name)
        if not slot.nbytes:
            return torch.empty(slot.shape, dtype=slot.dtype)
        if self._encrypted is not None:
            return torch.frombuffer(self._encrypted.read(begin, slot.nbytes), dtype=slot.dtype).reshape(slot.shape)
        flat = torch.frombuffer(self._map, dtype=slot.dtype, count=math.prod(slot.shape), offset=begin)
        return flat.reshape(slot.shape)
