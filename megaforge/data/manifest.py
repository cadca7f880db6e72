"""What a dataset is: its sidecar, and the digest of its content.

Everything that must not mix two datasets up (sample order, resume, index caches) is keyed by :func:`content_digest`,
never by a path or a modification time: a file replaced under the same name is another dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.data.indexed_dataset import IndexedDataset, sidecar_path
from megaforge.errors import UserError

SIDECAR_FORMAT = "megaforge-dataset"
SIDECAR_VERSION = 1
_EDGE_BYTES = 1 << 20
_PROBES = 64
_PROBE_BYTES = 1 << 14


def digest_of(value: object) -> str:
    """SHA-256 (hex) of a JSON-like value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Sidecar:
    """The part of ``PREFIX.json`` that reading needs; see the preprocessing tool for the rest.

    ``fingerprint`` is the tokenizer's SHA-256, ``vocab_size`` its number of ids, ``eod`` its end-of-document id,
    ``text_bytes`` the UTF-8 bytes that ``tokens`` tokens stand for.
    """

    path: Path
    tokenizer_type: str | None
    fingerprint: str | None
    vocab_size: int | None
    eod: int | None
    tokens: int | None
    text_bytes: int | None
    idx_sha256: str | None

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes a token stands for on average, or None if the sidecar does not say."""
        return self.text_bytes / self.tokens if self.text_bytes and self.tokens else None


def read_sidecar(prefix: str | os.PathLike[str]) -> Sidecar | None:
    """The sidecar of a dataset, or None where there is none (a dataset made by Megatron).

    Raises:
        UserError: the file is not a sidecar of a known version.
    """
    path = sidecar_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); preprocess the text again") from error
    if not isinstance(content, dict) or content.get("format") != SIDECAR_FORMAT:
        raise UserError(f'{path} is not a dataset description (its "format" is not "{SIDECAR_FORMAT}")')
    if content.get("version") != SIDECAR_VERSION:
        raise UserError(f"{path} has version {content.get('version')!r}; this MegaForge reads {SIDECAR_VERSION}")
    tokenizer = content.get("tokenizer") or {}
    field = _FieldReader(path, content)
    inner = _FieldReader(path, tokenizer)
    return Sidecar(
        path=path,
        tokenizer_type=inner.get("type", str),
        fingerprint=inner.get("fingerprint", str),
        vocab_size=inner.get("vocab_size", int),
        eod=inner.get("eod", int),
        tokens=field.get("tokens", int),
        text_bytes=field.get("text_bytes", int),
        idx_sha256=field.get("idx_sha256", str),
    )


class _FieldReader:
    def __init__(self, path: Path, content: Any) -> None:
        self._path = path
        self._content: Mapping[str, Any] = content if isinstance(content, dict) else {}

    def get(self, key: str, kind: type) -> Any:
        value = self._content.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f'{self._path}: "{key}" is {value!r}, not a {kind.__name__}')
        return value


def content_digest(dataset: IndexedDataset, sidecar: Sidecar | None) -> str:
    """SHA-256 (hex) that names the dataset's content, the same with or without a sidecar and wherever it lies.

    It covers the whole index, and of the tokens their number, the first and last MiB and blocks spread evenly between:
    reading a terabyte at every start would cost more than it tells.

    Raises:
        UserError: the sidecar describes another index (the files were replaced beside it).
    """
    with dataset.idx_path.open("rb") as file:
        index = hashlib.file_digest(file, "sha256").hexdigest()
    if sidecar is not None and sidecar.idx_sha256 is not None and sidecar.idx_sha256 != index:
        raise UserError(
            f"{sidecar.path} describes other files than {dataset.idx_path} (SHA-256 {index[:12]}, recorded "
            f"{sidecar.idx_sha256[:12]}): copy all three files again, or remove the stale .json"
        )
    return digest_of([SIDECAR_FORMAT, index, _probe_tokens(dataset)])


def _probe_tokens(dataset: IndexedDataset) -> str:
    content = dataset.tokens.view("u1")
    size = content.size
    probe = hashlib.sha256(f"{size}:".encode())
    if size <= 2 * _EDGE_BYTES + _PROBES * _PROBE_BYTES:
        probe.update(content.data)
        return probe.hexdigest()
    probe.update(content[:_EDGE_BYTES].data)
    for number in range(_PROBES):
        start = _EDGE_BYTES + (size - 2 * _EDGE_BYTES - _PROBE_BYTES) * number // (_PROBES - 1)
        probe.update(content[start : start + _PROBE_BYTES].data)
    probe.update(content[-_EDGE_BYTES:].data)
    return probe.hexdigest()
