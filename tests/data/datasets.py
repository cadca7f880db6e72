"""Small datasets for the tests, and a second reader of the format that shares no code with ours."""

from __future__ import annotations

import array
import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaforge.data.indexed_dataset import IndexedDatasetWriter
from megaforge.data.samples import ValidationData

TYPE_CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> str:
    """Writes one sequence a document and returns the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def write_sidecar(prefix: str, **changes: Any) -> Path:
    """A sidecar as preprocessing writes it; ``changes`` replace whole top-level entries."""
    index = Path(f"{prefix}.idx").read_bytes()
    content = {
        "format": "megaforge-dataset",
        "version": 1,
        "tokenizer": {"type": "NullTokenizer", "fingerprint": "a" * 64, "vocab_size": 1000, "eod": 0},
        "tokens": 100,
        "text_bytes": 250,
        "idx_sha256": hashlib.sha256(index).hexdigest(),
        **changes,
    }
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(content))
    return path


def random_documents(seed: int, count: int, longest: int, vocab: int = 1000) -> list[list[int]]:
    """Documents of 0 to ``longest`` random ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(0, longest + 1)).tolist() for _ in range(count)]


def second_reader(prefix: str) -> list[list[list[int]]]:
    """documents -> sequences -> ids, by the format's description alone: the standard library, field by field."""
    index = Path(f"{prefix}.idx").read_bytes()
    tokens = Path(f"{prefix}.bin").read_bytes()
    assert index[0:9] == b"MMIDIDX\0\0"
    assert struct.unpack("<Q", index[9:17]) == (1,)
    code = TYPE_CODES[index[17]]
    (sequences,) = struct.unpack("<Q", index[18:26])
    (entries,) = struct.unpack("<Q", index[26:34])
    at = 34
    lengths = struct.unpack(f"<{sequences}i", index[at : at + 4 * sequences])
    at += 4 * sequences
    pointers = struct.unpack(f"<{sequences}q", index[at : at + 8 * sequences])
    at += 8 * sequences
    firsts = struct.unpack(f"<{entries}q", index[at : at + 8 * entries])
    assert at + 8 * entries == len(index)
    read = []
    for length, pointer in zip(lengths, pointers, strict=True):
        ids = array.array(code)
        ids.frombytes(tokens[pointer : pointer + length * ids.itemsize])
        read.append(ids.tolist())
    return [read[first:stop] for first, stop in zip(firsts, firsts[1:], strict=False)]


def labels_of(view: ValidationData) -> int:
    """Labels that count, over all windows."""
    return sum(view.sample(k).targets for k in range(len(view)))
