"""Following a JSONL file while others write it, cut it, replace it or delete it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from megaforge.json_text import parse_json

AT_ONCE = 4 << 20  # bytes of one read: whoever follows many files gets to all of them
_KNOWN = 256  # bytes before the place reached by which a file is known again


class JsonlTail:
    """Gives the records of one file as they come.

    A last line without its end is left for later: it is being written. A run that goes on from a checkpoint cuts its
    metrics and writes them anew, perhaps beyond the place that was reached: the last bytes before that place tell.

    Attributes:
        again: the last :meth:`read` began at the top: what was read of the file before is void.
        behind: more stands in the file than one read takes; call again soon.
        taken: bytes that the last :meth:`read` took.
        missing: the file is not there, or cannot be opened.
        unreadable: lines that were passed over because they are not JSON objects.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.again = self.behind = False
        self.missing, self.unreadable, self.taken = True, 0, 0
        self._place, self._before, self._inode = 0, b"", -1

    def read(self, limit: int = AT_ONCE) -> list[dict[str, Any]]:
        """The whole records since the last call, of about ``limit`` bytes at most (one line is read whole)."""
        try:
            file = self.path.open("rb")
        except OSError:
            self.again = self._place > 0
            self.missing, self.behind, self.taken = True, False, 0
            self._restart(-1)
            return []
        with file:
            self.missing = False
            self.again = not self._is_where_it_was(file)
            if self.again:
                self._restart(os.fstat(file.fileno()).st_ino)
            return self._new_records(file, limit)

    def _restart(self, inode: int) -> None:
        self._place, self._before, self._inode, self.unreadable = 0, b"", inode, 0

    def _is_where_it_was(self, file: BinaryIO) -> bool:
        """Whether what was read still stands before the place; leaves the file there. True for a first look."""
        found = os.fstat(file.fileno())
        if self._place == 0:
            self._inode = found.st_ino
            return True
        if found.st_ino != self._inode or found.st_size < self._place:
            return False
        file.seek(self._place - len(self._before))
        return file.read(len(self._before)) == self._before

    def _new_records(self, file: BinaryIO, limit: int) -> list[dict[str, Any]]:
        file.seek(self._place)
        content = file.read(limit)
        end = content.rfind(b"\n") + 1
        if not end and len(content) == limit:  # a line longer than the limit
            content += file.readline()
            end = content.rfind(b"\n") + 1
        self.behind = end > 0 and len(content) >= limit
        content = content[:end]
        self.taken = end
        self._place += end
        self._before = (self._before + content)[-_KNOWN:]
        return self._objects(content)

    def _objects(self, content: bytes) -> list[dict[str, Any]]:
        records = []
        for line in content.split(b"\n")[:-1]:
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                self.unreadable += 1
        return records
