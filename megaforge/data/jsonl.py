"""JSON Lines files, plain or compressed, read forward in bounded memory and split by byte ranges.

A range [start, stop) of a file's (decompressed) bytes owns the lines that begin in it, so any cut of the file into
ranges gives every line to exactly one range, and the ranges' lines in order are the file's.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from megaforge.errors import UserError, require

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_LARGEST_WINDOW = 31  # log2 of bytes: the most that the format's tools write (zstd --long=31)


def compression(path: str | os.PathLike[str]) -> str | None:
    """gzip, zstd or None: by the name, in either case, and where the name does not say, by the first bytes."""
    named = _SUFFIXES.get(Path(path).suffix.lower())
    if named is not None:
        return named
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError:
        return None
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether the file is gzip or Zstandard (:func:`compression`)."""
    return compression(path) is not None


class LineReader:
    """Lines of one JSONL file, from any byte on, read in blocks.

    A compressed file can only be read forward: going back reopens it.

    Raises:
        UserError: the file is missing, or damaged or cut short where it is compressed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._compression = compression(path)
        self._position = 0  # always the beginning of a line, and the first one at or after byte _settled
        self._settled = 0
        self._file = self._open()

    def goto(self, start: int) -> None:
        """Moves to the first line that begins at or after byte ``start``."""
        if self._settled <= start <= self._position:
            return
        if self._compression:
            if start < self._position:
                self._file.close()
                self._file, self._position = self._open(), 0
            self._skip(max(0, start - 1 - self._position))
        else:
            self._file.seek(max(0, start - 1))
            self._position = max(0, start - 1)
        if start:
            self._position += len(self._guarded(self._file.readline))
        self._settled = start

    def chunks(self, stop: int | None, hint: int = _BLOCK) -> Iterator[list[bytes]]:
        """The lines that begin before byte ``stop`` (None: to the end), in lists of about ``hint`` bytes."""
        while stop is None or self._position < stop:
            want = hint if stop is None else min(hint, stop - self._position)
            at_start = self._position == 0
            lines = self._read_lines(want)
            if not lines:
                return
            self._position += sum(map(len, lines))
            self._settled = self._position if stop is None else min(self._position, stop)
            if at_start and lines[0].startswith(_BOM):
                lines[0] = lines[0][len(_BOM) :]
            yield lines

    @property
    def position(self) -> int:
        """The byte at which the next line begins."""
        return self._position

    def at_end(self) -> bool:
        """Whether no byte is left."""
        return not self._guarded(lambda: self._file.peek(1))

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes of the (decompressed) content, at most ``size``; the reader must be at its beginning."""
        head: bytes = self._guarded(lambda: self._file.peek(size))[:size]
        return head

    def rest(self) -> bytes:
        """All that is left, in memory."""
        content: bytes = self._guarded(self._file.read)
        self._position += len(content)
        return content

    def count_lines(self, stop: int) -> int:
        """The number of lines that begin before byte ``stop``, counted from the file's beginning."""
        self.goto(0)
        return sum(len(lines) for lines in self.chunks(stop))

    def expected_size(self, sample: int = 8 << 20) -> int:
        """About how many bytes the (decompressed) content has, from how much of the file its first ``sample`` bytes
        take; the reader must be at its beginning."""
        size = os.path.getsize(self.path)
        if self._compression is None:
            return size
        self._skip(sample)
        raw: Any = self._file.raw
        return self._position if self.at_end() else self._position * size // max(1, raw.packed_position())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> LineReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> io.BufferedReader:
        try:
            if self._compression == "gzip":
                return io.BufferedReader(_GzipReader(self.path, "rb"), _BLOCK)
            if self._compression == "zstd":
                return io.BufferedReader(_ZstdReader(self.path), _BLOCK)
            return io.BufferedReader(io.FileIO(self.path), _BLOCK)
        except OSError as error:
            raise UserError(f"--input {self.path}: {error.strerror}") from error

    def _read_lines(self, size: int) -> list[bytes]:
        """Whole lines of at least ``size`` bytes in all; ``readlines`` itself goes past its hint, and 0 means all."""
        if size <= 1:
            line = self._guarded(self._file.readline)
            return [line] if line else []
        lines: list[bytes] = self._guarded(lambda: self._file.readlines(size - 1))
        return lines

    def _skip(self, size: int) -> None:
        while size > 0:
            want = min(size, _BLOCK)
            block = self._guarded(lambda want=want: self._file.read(want))
            if not block:
                return
            size -= len(block)
            self._position += len(block)

    def _guarded(self, read: Any) -> Any:
        try:
            return read()
        except (OSError, EOFError, zlib.error) as error:
            where = f"after {self._position:,} bytes"
            raise UserError(f"--input {self.path}: damaged or cut short {where} ({error})") from error


class _GzipReader(gzip.GzipFile):
    """Gzip members of a file, decompressed."""

    def packed_position(self) -> int:
        """How much of the file was read."""
        file: Any = self.fileobj
        return int(file.tell())


class _ZstdReader(io.RawIOBase):
    """Zstandard frames of a file, decompressed; unlike the library's own reader it refuses a file cut short."""

    def __init__(self, path: str) -> None:
        zstandard = require("zstandard", extra="data", purpose=f"--input {path}")
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << _LARGEST_WINDOW).decompressobj
        self._parameters = zstandard.get_frame_parameters
        self._frame: Any = self._new()
        self._fresh = True
        self._path = path
        self._file = open(path, "rb")
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        """True: a raw reader."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills ``buffer`` with decompressed bytes; 0 at the end.

        Raises:
            EOFError: the last frame is not complete.
            OSError: the bytes are no Zstandard frame.
        """
        while not self._pending:
            block = self._file.read(1 << 14)
            if not block:
                if self._fresh:
                    return 0
                raise EOFError("the last Zstandard frame is not complete")
            self._pending = memoryview(self._decompress(block))
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def packed_position(self) -> int:
        """How much of the file was read."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        while block:
            try:
                parts.append(self._frame.decompress(block))
            except MemoryError as error:
                raise self._too_wide(block) from error
            except self._error as error:
                if "memory" in str(error):
                    raise self._too_wide(block) from error
                raise OSError(str(error)) from error
            self._fresh, block = False, b""
            if self._frame.eof:
                block = self._frame.unused_data
                self._frame, self._fresh = self._new(), True
        return b"".join(parts)

    def _too_wide(self, block: bytes) -> UserError:
        """The complaint about a frame that needs more memory to read back than there is."""
        try:
            window = f"{self._parameters(block).window_size:,} bytes"
        except (self._error, ValueError):
            window = "that size"
        return UserError(
            f"--input {self._path}: its Zstandard window of {window} (zstd --long) does not fit into memory; compress "
            "it again without --long, or decompress it first"
        )
