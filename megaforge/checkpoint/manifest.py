"""``manifest.json``: what a checkpoint holds, where, and how its files must hash. JSON and plain values only.

``SHA256SUMS`` beside it covers the manifest itself and every file, so that ``sha256sum -c SHA256SUMS`` checks a
checkpoint without this package.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megaforge.checkpoint.encryption import Seal
from megaforge.checkpoint.hashed_file import FileRecord
from megaforge.checkpoint.safetensors_file import DTYPES
from megaforge.errors import CheckpointError, DamagedCheckpointError
from megaforge.json_text import parse_json

MANIFEST_FILE = "manifest.json"
SUMS_FILE = "SHA256SUMS"
SIGNATURE_FILE = "manifest.hmac"  # of an encrypted checkpoint's manifest, by its key
FORMAT = "megaforge-checkpoint"
VERSION = 2  # 1: a parameter's name was not its path, and the parts of a run had no names


class ChunkRecord(NamedTuple):
    """Where one saved piece lies: file, and box in the global tensor."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class TensorRecord(NamedTuple):
    """One global tensor: safetensors' name of its type, global shape, and its pieces."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkRecord, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint except the tensors' bytes.

    Attributes:
        step: iteration at which it was taken.
        layout: size of each parallel axis at the time, and of the world.
        meta: what the trainer wants to keep (JSON).
        metric: score by which ``--keep-best`` ranks it, or None; lower is better (see save_checkpoint).
        files: name -> length and hash.
        tensors: key -> where its pieces are.
        seal: what its files were encrypted with, or None.
    """

    step: int
    layout: Mapping[str, int]
    meta: dict[str, Any]
    metric: float | None
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    seal: Seal | None = None

    def encode(self) -> bytes:
        """UTF-8 JSON, one line a file and a tensor."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "layout": dict(self.layout),
            "metric": self.metric,
            "meta": self.meta,
        }
        if self.seal is not None:
            head["encryption"] = {"key": self.seal.key_id, "checkpoint": self.seal.checkpoint}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        files = [f"{json.dumps(name)}: {json.dumps(record._asdict())}" for name, record in sorted(self.files.items())]
        tensors = []
        for key, record in sorted(self.tensors.items()):
            entry = {
                "dtype": record.dtype,
                "shape": record.shape,
                "chunks": [chunk._asdict() for chunk in record.chunks],
            }
            tensors.append(f"{json.dumps(key)}: {json.dumps(entry)}")
        lines.append('"files": {\n' + ",\n".join(files) + "\n}")
        lines.append('"tensors": {\n' + ",\n".join(tensors) + "\n}")
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def write_manifest(directory: Path, manifest: Manifest) -> list[Path]:
    """Writes ``manifest.json``, its signature where there is a key, and ``SHA256SUMS``; returns them, to be synced."""
    content = manifest.encode()
    sums = {name: record.sha256 for name, record in sorted(manifest.files.items())}
    sums[MANIFEST_FILE] = hashlib.sha256(content).hexdigest()
    written = {MANIFEST_FILE: content}
    if manifest.seal is not None and manifest.seal.key is not None:
        signature = manifest.seal.key.sign(content).encode()
        sums[SIGNATURE_FILE] = hashlib.sha256(signature).hexdigest()
        written[SIGNATURE_FILE] = signature
    written[SUMS_FILE] = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    for name, text in written.items():
        (directory / name).write_bytes(text)
    return [directory / name for name in written]


def sums_digest(directory: Path) -> str:
    """The SHA-256 of ``SHA256SUMS`` of the checkpoint ``directory``, and so of all that is in it.

    Raises:
        OSError: it cannot be read.
    """
    return hashlib.sha256((directory / SUMS_FILE).read_bytes()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the checkpoint ``directory``, its own hash checked.

    Raises:
        DamagedCheckpointError: missing or altered.
        CheckpointError: whole, but of a format or version that this program does not read.
        OSError: it cannot be read for another reason (permissions, I/O error).
    """
    try:
        content = (directory / MANIFEST_FILE).read_bytes()
        sums = (directory / SUMS_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{directory}: {Path(error.filename).name} is missing") from error
    if f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}" not in sums.splitlines():
        raise DamagedCheckpointError(f"{directory}: {MANIFEST_FILE} is not what {SUMS_FILE} says")
    try:
        fields = parse_json(content)
        if fields.get("format") != FORMAT or fields.get("version") != VERSION:
            raise CheckpointError(
                f"{directory}: {MANIFEST_FILE} is {fields.get('format')!r} version {fields.get('version')!r}; "
                f"this program reads {FORMAT!r} version {VERSION}; use the version of MegaForge that wrote it"
            )
        return _decode(directory, fields)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedCheckpointError(
            f"{directory}: {MANIFEST_FILE} is malformed ({type(error).__name__}: {error})"
        ) from error


def _decode(directory: Path, fields: dict[str, Any]) -> Manifest:
    files = {
        str(name): FileRecord(int(record["bytes"]), str(record["sha256"])) for name, record in fields["files"].items()
    }
    for name in files:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise DamagedCheckpointError(f"{directory}: {MANIFEST_FILE} names {name!r}, which is not a plain file name")
    tensors = {}
    for key, entry in fields["tensors"].items():
        chunks = tuple(
            ChunkRecord(str(chunk["file"]), tuple(map(int, chunk["offsets"])), tuple(map(int, chunk["sizes"])))
            for chunk in entry["chunks"]
        )
        unknown = {chunk.file for chunk in chunks} - files.keys()
        if unknown or entry["dtype"] not in DTYPES:
            raise DamagedCheckpointError(
                f"{directory}: {MANIFEST_FILE}: {key} is of type {entry['dtype']}, in unlisted files {sorted(unknown)}"
            )
        shape = tuple(map(int, entry["shape"]))
        if any(not len(chunk.offsets) == len(chunk.sizes) == len(shape) for chunk in chunks):
            raise DamagedCheckpointError(f"{directory}: {MANIFEST_FILE}: pieces of {key} do not fit its shape {shape}")
        tensors[str(key)] = TensorRecord(entry["dtype"], shape, chunks)
    metric, sealed = fields["metric"], fields.get("encryption")
    return Manifest(
        step=int(fields["step"]),
        layout={str(axis): int(size) for axis, size in fields["layout"].items()},
        meta=dict(fields["meta"]),
        metric=None if metric is None or math.isnan(float(metric)) else float(metric),
        files=files,
        tensors=tensors,
        seal=None if sealed is None else Seal(str(sealed["key"]), str(sealed["checkpoint"])),
    )
