"""What a dataset is: its sidecar, and the digest of its content.

Everything that must not mix two datasets up (sample order, resume, index caches) is keyed by :func:`content_digest`,
never by a path or a modification time: a file replaced under the same name is another dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaforge.data.indexed_dataset import IndexedDataset, sidecar_path
from megaforge.errors import UserError
from megaforge.json_text import parse_json

SIDECAR_FORMAT = "megaforge-dataset"
SIDECAR_VERSION = 1
_EDGE_BYTES = 1 << 20
_PROBES = 64
_PROBE_BYTES = 1 << 14
_WHOLE_BYTES = 32 << 20  # token files up to here are hashed whole at every start
# What the datasets of a blend must have in common.
_AGREED = {
    "tokenizer_type": "the tokenizer's type",
    "fingerprint": "the tokenizer's SHA-256",
    "eod": "the end-of-document id",
    "append_eod": "--append-eod",
}


def digest_of(value: object) -> str:
    """SHA-256 (hex) of a JSON-like value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Sidecar:
    """The part of ``PREFIX.json`` that reading needs; see the preprocessing tool for the rest.

    ``fingerprint`` is the tokenizer's SHA-256, ``vocab_size`` its number of ids, ``eod`` its end-of-document id,
    ``eod_token`` the name that was given for it, ``append_eod`` whether it ends every document, ``json_key`` where the
    text came from, ``text_bytes`` the UTF-8 bytes that ``tokens`` tokens stand for; ``sources`` the SHA-256 of the text
    files; ``bin_bytes``, ``bin_probe`` and ``bin_sha256`` tell a damaged token file; ``corpus`` is the digest of the
    corpus (``tools/prepare_corpus.py``) that it is a part of, and what a data schedule may weigh it by: its domain,
    quality, difficulty and date.
    """

    path: Path
    tokenizer_type: str | None
    fingerprint: str | None
    vocab_size: int | None
    eod: int | None
    tokens: int | None
    text_bytes: int | None
    idx_sha256: str | None
    eod_token: str | None = None
    append_eod: bool | None = None
    json_key: str | None = None
    bin_bytes: int | None = None
    bin_probe: str | None = None
    bin_sha256: str | None = None
    sources: tuple[str, ...] = ()
    corpus: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes a token stands for on average, or None if the sidecar does not say."""
        return self.text_bytes / self.tokens if self.text_bytes and self.tokens else None

    def choices(self) -> dict[str, Any]:
        """What was chosen when the text was prepared, JSON-like, as it travels with checkpoints."""
        names = ("tokenizer_type", "fingerprint", "eod", "eod_token", "append_eod", "json_key")
        return {name: getattr(self, name) for name in names}


def read_sidecar(prefix: str | os.PathLike[str]) -> Sidecar | None:
    """The sidecar of a dataset, or None where there is none (a dataset made by Megatron).

    Raises:
        UserError: the file is not a sidecar of a known version.
    """
    path = sidecar_path(prefix)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); preprocess the text again") from error
    if not isinstance(content, dict) or content.get("format") != SIDECAR_FORMAT:
        raise UserError(f'{path} is not a dataset description (its "format" is not "{SIDECAR_FORMAT}")')
    if content.get("version") != SIDECAR_VERSION:
        raise UserError(f"{path} has version {content.get('version')!r}; this MegaForge reads {SIDECAR_VERSION}")
    tokenizer = content.get("tokenizer") or {}
    outer = _FieldReader(path, content)
    inner = _FieldReader(path, tokenizer)
    settings = _FieldReader(path, content.get("settings"))
    return Sidecar(
        path=path,
        tokenizer_type=inner.get("type", str),
        fingerprint=inner.get("fingerprint", str),
        vocab_size=inner.get("vocab_size", int),
        eod=inner.get("eod", int),
        tokens=outer.get("tokens", int),
        text_bytes=outer.get("text_bytes", int),
        idx_sha256=outer.get("idx_sha256", str),
        eod_token=inner.get("eod_token", str),
        append_eod=settings.get("append_eod", bool),
        json_key=settings.get("json_key", str),
        bin_bytes=outer.get("bin_bytes", int),
        bin_probe=outer.get("bin_probe", str),
        bin_sha256=outer.get("bin_sha256", str),
        sources=tuple(
            str(source["sha256"])
            for source in outer.get("sources", list) or ()
            if isinstance(source, dict) and source.get("sha256")
        ),
        corpus=outer.get("corpus", dict) or {},
    )


def check_agreement(sidecars: Sequence[Sidecar | None]) -> None:
    """Refuses a blend of datasets that were prepared for different models.

    Raises:
        UserError: naming two descriptions and what differs.
    """
    described = [sidecar for sidecar in sidecars if sidecar is not None]
    for other in described[1:]:
        for name, meaning in _AGREED.items():
            one, two = getattr(described[0], name), getattr(other, name)
            if None not in (one, two) and one != two:
                raise UserError(
                    f"--data-path blends datasets that do not belong together: {meaning} is {one} in "
                    f"{described[0].path} and {two} in {other.path}; preprocess one of the texts again as the other was"
                )


class _FieldReader:
    def __init__(self, path: Path, content: Any) -> None:
        self._path = path
        self._content: Mapping[str, Any] = content if isinstance(content, dict) else {}

    def get(self, key: str, kind: type) -> Any:
        value = self._content.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise UserError(f'{self._path}: "{key}" is {value!r}, not a {kind.__name__}')
        return value


def content_digest(dataset: IndexedDataset, sidecar: Sidecar | None, *, verify: bool = False) -> str:
    """SHA-256 (hex) that names the dataset's content, the same with or without a sidecar and wherever it lies.

    It covers the whole index, and of the tokens their number, the first and last MiB and blocks spread evenly between:
    reading a terabyte at every start would cost more than it tells. What the sidecar records of the files is compared:
    sizes, the index, and of the tokens these same parts; all of them where they are few, or with ``verify``.

    Raises:
        UserError: the files are damaged or were replaced beside their sidecar, or ``verify`` has nothing to go by.
    """
    index, probe = _sha256(dataset.idx_path), probe_tokens(dataset)
    if sidecar is not None:
        _compare(dataset.idx_path, sidecar, index, sidecar.idx_sha256)
        size = dataset.tokens.nbytes
        _compare(dataset.bin_path, sidecar, f"{size:,} bytes", f"{sidecar.bin_bytes or size:,} bytes")
        _compare(dataset.bin_path, sidecar, probe, sidecar.bin_probe)
        if sidecar.bin_sha256 is not None and (verify or size <= _WHOLE_BYTES):
            _compare(dataset.bin_path, sidecar, _sha256(dataset.bin_path), sidecar.bin_sha256)
    if verify and (sidecar is None or None in (sidecar.bin_sha256, sidecar.idx_sha256)):
        raise UserError(
            f"--verify-data: {dataset.prefix}.json does not record the files' SHA-256, so they cannot be verified; "
            "preprocess the text again, or leave out --verify-data"
        )
    return digest_of([SIDECAR_FORMAT, index, probe])


def _compare(path: Path, sidecar: Sidecar, found: str, recorded: str | None) -> None:
    if recorded is not None and found != recorded:
        raise UserError(
            f"{sidecar.path} describes other files than {path}, which is damaged or was replaced "
            f"({found[:20]}, recorded {recorded[:20]}): copy all three files again, or preprocess the text again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe_tokens(dataset: IndexedDataset) -> str:
    """SHA-256 (hex) of parts of the token file: its ends, and blocks spread evenly between."""
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
