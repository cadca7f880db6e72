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
from megaforge.data.left_out import kind_of
from megaforge.data.preprocess.plan import Shard, WorkDirectory, read_manifest, write_json
from megaforge.data.text.readers import Chunk, TextReader, open_text, place
from megaforge.data.tokenizer import Tokenizer, load_tokenizer
from megaforge.errors import UserError

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
    unit: str = "line"
    lines: list[int] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[int, int, str]] = field(default_factory=list)


class ShardTokenizer:
    """Turns shards into datasets in the work directory, one after another, with one encoder and one open source."""

    def __init__(self, spec: WorkerSpec, encoder: Encoder | None = None) -> None:
        self.spec = spec
        self._encoder = encoder or make_encoder(spec)
        self._work = WorkDirectory(Path(spec.work_directory))
        self._dtype = np.dtype(spec.dtype)
        self._eod = None if spec.eod is None else np.array([spec.eod], self._dtype)
        self._reader: tuple[int, TextReader] | None = None

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
        counts.unit = reader.unit
        for chunk in reader.chunks(stop):
            self._bad_records(chunk, source, start, counts)
            tokens, lengths = self._tokens(chunk.texts)
            writer.add_documents(tokens, lengths)
            counts.documents += len(chunk.texts)
            counts.text_bytes += chunk.text_bytes
            counts.tokens += tokens.size
            counts.lines[-1] += chunk.records
            counts.input_bytes += chunk.input_bytes
            report(chunk.input_bytes, tokens.size)

    def _open(self, source: int) -> TextReader:
        if self._reader is not None and self._reader[0] == source:
            return self._reader[1]
        if self._reader is not None:
            self._reader[1].close()
        self._reader = (source, open_text(self.spec.sources[source], self.spec.json_key))
        return self._reader[1]

    def _bad_records(self, chunk: Chunk, source: int, start: int, counts: _Counts) -> None:
        """Takes note of the records without a text; under ``--on-error fail`` the first one ends the run."""
        path = self.spec.sources[source]
        for number, reason in chunk.bad:
            record = counts.lines[-1] + number + 1
            if self.spec.on_error == "fail":
                with open_text(path, self.spec.json_key) as reader:
                    where = place(reader, record + reader.count_records(start))
                raise UserError(f"--input {path}{where}: {reason}; fix it, or pass --on-error skip")
            counts.reasons[kind_of(reason)] = counts.reasons.get(kind_of(reason), 0) + 1
            if len(counts.skipped) < MAX_REPORTED:
                counts.skipped.append((len(counts.lines) - 1, record, reason))

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
