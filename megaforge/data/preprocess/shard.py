"""One shard: lines in, tokens out. What a worker does from its first byte to its manifest, in bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megaforge.data.fast_bpe import FastEncoder
from megaforge.data.indexed_dataset import IndexedDatasetWriter, bin_path, idx_path
from megaforge.data.jsonl import LineReader
from megaforge.data.preprocess.plan import Shard, WorkDirectory, read_manifest, write_json
from megaforge.data.tokenizer import Tokenizer, load_tokenizer
from megaforge.errors import UserError, require

Report = Callable[[int, int], None]
MAX_REPORTED = 1000
_SLOW_BATCH = 1 << 16  # characters
_LINE_END = re.compile(r"(?<=[!-~])\n(?=[!-~])")


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs, as JSON. ``fast`` is the file of a proven fast encoder's definition, or None;
    ``eod`` the id to end documents with, or None."""

    tokenizer_type: str
    tokenizer_model: str
    eod_token: str | None
    fast: str | None
    eod: int | None
    dtype: str
    json_key: str
    on_error: str
    work_directory: str
    sources: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The specification as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> WorkerSpec:
        """The specification from :meth:`to_json`."""
        return cls(**{**value, "sources": tuple(value["sources"])})


class Encoder(Protocol):
    """Texts to ids."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One integer array a text."""
        ...


class SlowEncoder:
    """The reference encoder: the tokenizer's own library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text. Few texts at a time: the library needs some hundred bytes a token while it works."""
        arrays: list[np.ndarray] = []
        batch: list[str] = []
        size = 0
        for text in texts:
            if len(text) > _SLOW_BATCH and self._tokenizer.cuts_at_lines:
                parts = [self._arrays([part])[0] for part in _cut_at_lines(text)]
                arrays += [*self._arrays(batch), np.concatenate(parts)]
                batch, size = [], 0
                continue
            batch.append(text)
            size += len(text)
            if size >= _SLOW_BATCH:
                arrays += self._arrays(batch)
                batch, size = [], 0
        return arrays + self._arrays(batch)

    def _arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._tokenizer.encode_batch(texts)]


def _cut_at_lines(text: str) -> Iterator[str]:
    """Parts of a long text that are encoded alike alone and together; see ``Tokenizer.cuts_at_lines``."""
    start = 0
    while found := _LINE_END.search(text, start + _SLOW_BATCH):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def make_encoder(spec: WorkerSpec) -> Encoder:
    """The fast encoder where the specification has one, else the tokenizer's own library."""
    if spec.fast is not None:
        return FastEncoder(Path(spec.fast).read_text(encoding="utf-8"))
    return SlowEncoder(load_tokenizer(spec.tokenizer_type, spec.tokenizer_model, spec.eod_token))


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    input_bytes: int = 0
    lines: list[int] = field(default_factory=list)
    skipped_count: int = 0
    skipped: list[tuple[int, int, str]] = field(default_factory=list)


class ShardTokenizer:
    """Turns shards into datasets in the work directory, one after another, with one encoder and one open source."""

    def __init__(self, spec: WorkerSpec, encoder: Encoder | None = None) -> None:
        self.spec = spec
        self._encoder = encoder or make_encoder(spec)
        self._loads = require("orjson", extra="data", purpose="reading JSONL").loads
        self._work = WorkDirectory(Path(spec.work_directory))
        self._dtype = np.dtype(spec.dtype)
        self._eod = None if spec.eod is None else np.array([spec.eod], self._dtype)
        self._reader: tuple[int, LineReader] | None = None

    def run(self, shard: Shard, report: Report) -> dict[str, Any]:
        """Tokenises the shard, or verifies and keeps what an earlier run finished; returns its manifest.

        ``report(bytes, tokens)`` is called as the input advances.

        Raises:
            UserError: a bad line under ``--on-error fail``, a damaged source, a full disk.
        """
        prefix, path = self._work.prefix(shard), self._work.manifest(shard)
        kept = read_manifest(path)
        if kept is not None and kept["shard"] == _normal(shard.to_json()) and kept["files"] == _digests(prefix):
            report(kept["input_bytes"], kept["tokens"])
            return kept
        path.unlink(missing_ok=True)
        counts = _Counts()
        try:
            with IndexedDatasetWriter(prefix, self._dtype) as writer:
                for source, start, stop in shard.segments:
                    self._segment(source, start, stop, writer, counts, report)
                end = self._open(shard.segments[-1][0]).at_end()
            manifest = {
                "shard": _normal(shard.to_json()),
                **dataclasses.asdict(counts),
                "end": end,
                "files": _digests(prefix),
            }
            write_json(path, manifest)
        except OSError as error:
            raise UserError(f"cannot write {prefix}.bin: {error.strerror}; the finished shards are kept") from error
        return manifest

    def _segment(
        self, source: int, start: int, stop: int | None, writer: IndexedDatasetWriter, counts: _Counts, report: Report
    ) -> None:
        reader = self._open(source)
        reader.goto(start)
        counts.lines.append(0)
        for lines in reader.chunks(stop):
            texts = self._texts(lines, source, start, counts)
            tokens, lengths = self._tokens(texts)
            writer.add_documents(tokens, lengths)
            counts.documents += len(texts)
            counts.tokens += tokens.size
            counts.lines[-1] += len(lines)
            size = sum(map(len, lines))
            counts.input_bytes += size
            report(size, tokens.size)

    def _open(self, source: int) -> LineReader:
        if self._reader is not None and self._reader[0] == source:
            return self._reader[1]
        if self._reader is not None:
            self._reader[1].close()
        self._reader = (source, LineReader(self.spec.sources[source]))
        return self._reader[1]

    def _texts(self, lines: list[bytes], source: int, start: int, counts: _Counts) -> list[str]:
        key, loads = self.spec.json_key, self._loads
        texts: list[str] = []
        size = 0
        for number, line in enumerate(lines):
            try:
                text = loads(line)[key]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                if not line.isspace():
                    self._bad_line(source, start, number, _reason(error, key), counts)
                continue
            if type(text) is not str:
                self._bad_line(source, start, number, f"{key!r} is no string but {_shorten(text)}", counts)
                continue
            texts.append(text)
            size += len(text) if text.isascii() else len(text.encode())
        counts.text_bytes += size
        return texts

    def _bad_line(self, source: int, start: int, number: int, reason: str, counts: _Counts) -> None:
        line = counts.lines[-1] + number + 1
        if self.spec.on_error == "fail":
            with LineReader(self.spec.sources[source]) as reader:
                line += reader.count_lines(start)
            raise UserError(
                f"--input {self.spec.sources[source]}, line {line}: {reason}; mend the line, or pass --on-error skip"
            )
        counts.skipped_count += 1
        if len(counts.skipped) < MAX_REPORTED:
            counts.skipped.append((len(counts.lines) - 1, line, reason))

    def _tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids back to back, an end-of-document id after each non-empty text, and the length of every text."""
        arrays = self._encoder.encode(texts)
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        if self._eod is not None:
            ended: list[np.ndarray] = [self._eod] * (2 * len(arrays))
            ended[::2] = arrays
            for empty in np.flatnonzero(lengths == 0).tolist():
                ended[2 * empty + 1] = arrays[empty]
            lengths += lengths > 0
            arrays = ended
        if not arrays:
            return np.empty(0, self._dtype), lengths
        return np.concatenate(arrays, dtype=self._dtype, casting="unsafe"), lengths


def _reason(error: Exception, key: str) -> str:
    if isinstance(error, KeyError):
        return f"the record has no key {key!r} (--json-keys)"
    if isinstance(error, ValueError):
        return f"not valid JSON ({error})"
    return "the line is JSON but no object"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _normal(shard: dict[str, Any]) -> dict[str, Any]:
    """The shard as JSON gives it back (tuples are lists)."""
    return {**shard, "segments": [list(segment) for segment in shard["segments"]]}


def _digests(prefix: os.PathLike[str]) -> dict[str, str] | None:
    """SHA-256 of a shard's two files, or None where one is missing."""
    digests = {}
    for path in (bin_path(prefix), idx_path(prefix)):
        try:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None
    return digests
