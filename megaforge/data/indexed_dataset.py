"""Token files in Megatron's indexed format (MMIDIDX), read and written byte for byte.

A dataset is a prefix with two files. ``PREFIX.bin`` is the tokens of all sequences, back to back. ``PREFIX.idx`` is,
little-endian and without padding: 9 bytes ``MMIDIDX\\0\\0``, u64 version (1), u8 dtype code, u64 number of sequences,
u64 number of documents + 1, i32 lengths (tokens), i64 byte pointers into the .bin, i64 document indices (the first
sequence of each document, then the number of sequences). A document without tokens has an entry but no sequence.
The format is that of NVIDIA Megatron-LM, ``megatron/core/datasets/indexed_dataset.py``.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from megaforge.durable import sync_path
from megaforge.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 1 << 20  # index entries held in memory at once while writing, whatever the size of the dataset
_COPY_BYTES = 16 << 20


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron's builder picks for ids below ``vocab_size``: uint16 under 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """The token file of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """The index file of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.idx")


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    """The JSON description that our preprocessing writes next to the two files."""
    return Path(f"{os.fspath(prefix)}.json")


class IndexedDataset:
    """A memory-mapped dataset: opening it costs the index, reading it copies nothing.

    Attributes:
        dtype: the stored integer type of a token.
        sequence_lengths: int32 [sequences], tokens.
        sequence_pointers: int64 [sequences], byte offsets into the .bin.
        document_indices: int64 [documents + 1], first sequence of each document.
        tokens: [num_tokens], the whole .bin as one read-only array.
        num_tokens: tokens of all sequences.

    Raises:
        UserError: a file is missing, truncated, of another format, or the two files do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.bin_path, self.idx_path = bin_path(prefix), idx_path(prefix)
        check_files(self.prefix)
        self._read_index()
        itemsize = self.dtype.itemsize
        self.num_tokens = int(self.sequence_lengths.sum(dtype=np.int64))
        expected, found = self.num_tokens * itemsize, self.bin_path.stat().st_size
        if found != expected:
            state = "truncated" if found < expected else "longer than its index says"
            raise UserError(
                f"{self.bin_path} is {state}: {found:,} bytes, but {self.idx_path} describes {expected:,}; "
                "copy both files again or preprocess the text again"
            )
        self._check_index()
        self.tokens = np.frombuffer(_map(self.bin_path), dtype=self.dtype)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.document_indices) - 1

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of one sequence: a read-only view of the mapped file, in its own dtype.

        Raises:
            IndexError: the sequence or the range lies outside the dataset.
        """
        size = int(self.sequence_lengths[sequence])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"tokens [{offset}, {stop}) of sequence {sequence}, which has {size}, in {self.bin_path}")
        start = int(self.sequence_pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start + offset : start + stop]

    def document_extents(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(start, length) of every document in tokens: two int64 [documents]. A document's sequences are adjacent."""
        bounds = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.sequence_lengths, out=bounds[1:])
        edges = bounds[self.document_indices]
        return edges[:-1], np.diff(edges)

    def _read_index(self) -> None:
        size = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if header[:9] != MAGIC:
            raise UserError(f"{self.idx_path} is not a Megatron index file (it does not start with MMIDIDX)")
        if len(header) < HEADER_BYTES:
            raise UserError(f"{self.idx_path} is truncated: {size} bytes end inside its header")
        version, code, sequences, entries = struct.unpack_from("<QBQQ", header, 9)
        if version != VERSION:
            raise UserError(f"{self.idx_path} has index version {version}; only version {VERSION} is known")
        if code not in DTYPES or DTYPES[code].kind == "f":
            raise UserError(f"{self.idx_path} has dtype code {code}, not an integer type, so it holds no tokens")
        expected = HEADER_BYTES + 12 * sequences + 8 * entries
        # Megatron's multimodal writer appends one mode byte a sequence; the file does not say so, only its size does.
        if entries < 1 or size not in (expected, expected + sequences):
            raise UserError(
                f"{self.idx_path} is truncated or damaged: {size:,} bytes, but its header "
                f"({sequences:,} sequences, {max(entries - 1, 0):,} documents) asks for {expected:,}"
            )
        self.dtype = DTYPES[code]
        buffer = _map(self.idx_path)
        self.sequence_lengths = np.frombuffer(buffer, "<i4", sequences, HEADER_BYTES)
        self.sequence_pointers = np.frombuffer(buffer, "<i8", sequences, HEADER_BYTES + 4 * sequences)
        self.document_indices = np.frombuffer(buffer, "<i8", entries, HEADER_BYTES + 12 * sequences)

    def _check_index(self) -> None:
        """Lengths, pointers and documents must agree, so that no later read can leave the file."""
        lengths, itemsize, carry = self.sequence_lengths, self.dtype.itemsize, 0
        for start in range(0, len(lengths), _CHUNK):
            part = lengths[start : start + _CHUNK]
            ends = carry + np.cumsum(part, dtype=np.int64) * itemsize
            if (part < 0).any() or not np.array_equal(
                self.sequence_pointers[start : start + _CHUNK], ends - part.astype(np.int64) * itemsize
            ):
                raise UserError(f"{self.idx_path} is damaged: its lengths and pointers contradict each other")
            carry = int(ends[-1])
        documents = self.document_indices
        if documents[0] != 0 or documents[-1] != len(lengths) or (documents[1:] < documents[:-1]).any():
            raise UserError(f"{self.idx_path} is damaged: its document indices do not cover its sequences in order")


def _map(path: Path) -> mmap.mmap | bytes:
    """The file's bytes, memory-mapped; an empty file cannot be mapped and needs no mapping."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def check_files(prefix: str) -> None:
    """Checks that both files of a dataset are there.

    Raises:
        UserError: naming the one that is missing.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise UserError(f"the dataset file {path} does not exist{_suggestion(prefix)}")


def _suggestion(prefix: str) -> str:
    if os.path.isfile(f"{prefix}_text_document.idx"):
        return f"; did you mean {prefix}_text_document?"
    return "; --data-path takes the prefix of a .bin/.idx pair, as tools/preprocess_data.py writes them"


class IndexedDatasetWriter:
    """Writes a dataset under temporary names and publishes it whole on :meth:`close`.

    Used as a context manager, an exception removes the temporary files; a killed process leaves only files named
    ``PREFIX.bin.tmp-PID`` and the like, never half a dataset under the final name. Memory does not grow with the
    number of documents: their lengths wait in a file.

    Raises:
        UserError: a token does not fit ``dtype``, a document is too long, or the directory cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES or self.dtype.kind == "f":
            raise ValueError(f"{self.dtype} is not an integer type of the format")
        self.documents = self.sequences = self.tokens = 0
        self._bin_temporary = _temporary(bin_path(prefix))
        self._lengths_temporary = _temporary(Path(f"{self.prefix}.lengths"))
        self._bin = _create(self._bin_temporary)
        self._lengths = _create(self._lengths_temporary)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends one document of integer ``tokens`` [length]; an empty one gets an entry without a sequence."""
        array = np.asarray(tokens)
        self.add_documents(array if array.size else array.astype(self.dtype), [array.size])

    def add_documents(self, tokens: np.ndarray, lengths: npt.ArrayLike) -> None:
        """Appends many documents at once: flat ``tokens`` [sum(lengths)] and each document's length, in order."""
        sizes = np.asarray(lengths, np.int64)
        if sizes.sum() != tokens.size or (sizes < 0).any():
            raise ValueError(f"{tokens.size} tokens were given for documents of {int(sizes.sum())} in all")
        if sizes.size and sizes.max() > np.iinfo(np.int32).max:
            raise UserError(f"{self.prefix}: a document of {int(sizes.max()):,} tokens is over the format's 2^31 - 1")
        if tokens.dtype != self.dtype and tokens.size:
            low, high, info = int(tokens.min()), int(tokens.max()), np.iinfo(self.dtype)
            if low < info.min or high > info.max:
                raise UserError(f"{self.prefix}: token ids {low}..{high} do not fit the dataset's {self.dtype}")
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._lengths.write(sizes.astype("<i4").data)
        self.documents += sizes.size
        self.sequences += int(np.count_nonzero(sizes))
        self.tokens += tokens.size

    def close(self) -> None:
        """Writes the index and publishes both files; they are durable when this returns."""
        _sync_and_close(self._bin)
        _sync_and_close(self._lengths)
        lengths = np.frombuffer(_map(self._lengths_temporary), "<i4")
        index = _temporary(idx_path(self.prefix))
        with _create(index) as file:
            _write_header(file, self.dtype, self.sequences, self.documents)
            for part in _chunks(lengths):
                file.write(part[part > 0].data)
            _write_pointers(file, (part[part > 0] for part in _chunks(lengths)), self.dtype.itemsize)
            _write_document_indices(file, (part > 0 for part in _chunks(lengths)))
            _sync_and_close(file)
        _publish(self.prefix, self._bin_temporary, index)
        self._lengths_temporary.unlink()

    def abort(self) -> None:
        """Removes what was written; nothing of it was ever visible under the final name."""
        self._bin.close()
        self._lengths.close()
        for path in (self._bin_temporary, self._lengths_temporary, _temporary(idx_path(self.prefix))):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise


def merge_shards(prefixes: Sequence[str | os.PathLike[str]], output_prefix: str | os.PathLike[str]) -> None:
    """Joins datasets of one dtype, in order, into ``output_prefix``; published whole, in bounded memory.

    The result is what one writer given all documents in that order would have written. The inputs stay.

    Raises:
        UserError: an input is unreadable, or two differ in dtype.
    """
    shards = [IndexedDataset(prefix) for prefix in prefixes]
    if not shards:
        raise ValueError("no shards to merge")
    dtype = shards[0].dtype
    for shard in shards:
        if shard.dtype != dtype:
            raise UserError(
                f"{shard.bin_path} holds {shard.dtype} tokens and {shards[0].bin_path} {dtype}; both must agree"
            )
    tokens, index = _temporary(bin_path(output_prefix)), _temporary(idx_path(output_prefix))
    try:
        with _create(tokens) as file:
            for shard in shards:
                with shard.bin_path.open("rb") as source:
                    while block := source.read(_COPY_BYTES):
                        file.write(block)
            _sync_and_close(file)
        with _create(index) as file:
            _write_header(file, dtype, sum(map(len, shards)), sum(shard.num_documents for shard in shards))
            for shard in shards:
                for part in _chunks(shard.sequence_lengths):
                    file.write(part.data)
            parts = (part for shard in shards for part in _chunks(shard.sequence_lengths))
            _write_pointers(file, parts, dtype.itemsize)
            counts = (np.diff(part) for shard in shards for part in _chunks(shard.document_indices, overlap=1))
            _write_document_indices(file, counts)
            _sync_and_close(file)
        _publish(output_prefix, tokens, index)
    finally:
        tokens.unlink(missing_ok=True)
        index.unlink(missing_ok=True)


def _chunks(array: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    """Consecutive parts of an array [n], each beginning with the last ``overlap`` entries of the one before."""
    for start in range(0, len(array) - overlap, _CHUNK):
        yield array[start : start + _CHUNK + overlap]


def _write_header(file: IO[bytes], dtype: np.dtype, sequences: int, documents: int) -> None:
    file.write(MAGIC + struct.pack("<QBQQ", VERSION, _CODES[dtype], sequences, documents + 1))


def _write_pointers(file: IO[bytes], lengths: Iterator[np.ndarray], itemsize: int) -> None:
    start = 0
    for part in lengths:
        ends = start + np.cumsum(part, dtype=np.int64) * itemsize
        file.write((ends - part * np.int64(itemsize)).astype("<i8").data)
        start = int(ends[-1]) if ends.size else start


def _write_document_indices(file: IO[bytes], sequences_per_document: Iterator[np.ndarray]) -> None:
    file.write(struct.pack("<q", 0))
    total = 0
    for part in sequences_per_document:
        ends = total + np.cumsum(part, dtype=np.int64)
        file.write(ends.astype("<i8").data)
        total = int(ends[-1]) if ends.size else total


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _create(path: Path) -> IO[bytes]:
    try:
        return path.open("wb", buffering=1 << 20)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable directory") from error


def _sync_and_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _publish(prefix: str | os.PathLike[str], tokens: Path, index: Path) -> None:
    """Renames both files into place. An older index and sidecar go first: old and new must never be seen as a pair."""
    sidecar_path(prefix).unlink(missing_ok=True)
    idx_path(prefix).unlink(missing_ok=True)
    os.replace(tokens, bin_path(prefix))
    os.replace(index, idx_path(prefix))
    sync_path(bin_path(prefix).parent)
