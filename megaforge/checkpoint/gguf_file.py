"""The GGUF file format, written (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3).

Little-endian: a magic number, counts, key-value pairs, descriptions of tensors, then their bytes, each aligned to 32.
The package of that name does not know all block types that it would have to write.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
    """Writes and fsyncs ``file``, which must not exist.

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
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell()
