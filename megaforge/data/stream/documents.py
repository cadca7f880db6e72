"""The documents of a stream's files, in their order, in rounds of a fixed number, from any round on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from megaforge.data.text.readers import Chunk, TextReader, open_text, place
from megaforge.errors import UserError


@dataclass(frozen=True, order=True)
class Mark:
    """Where a round begins.

    Attributes:
        cursor: tokens of the stream before it.
        epoch, round: passes over the files before it, and rounds before it in its own.
        file, position, skip: the number of its file; the place there, as :mod:`megaforge.data.text.readers` counts
            them; and the documents behind that place that belong to earlier rounds.
    """

    cursor: int = 0
    epoch: int = 0
    round: int = 0
    file: int = 0
    position: int = 0
    skip: int = 0

    def to_json(self) -> dict[str, int]:
        """As checkpoints keep it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Mark:
        """From :meth:`to_json`.

        Raises:
            TypeError: it is something else.
        """
        return cls(**{name: int(number) for name, number in value.items()})


_NOWHERE = Mark(file=-1)


class Documents:
    """The documents of ``names``, read forward; not for several threads at once.

    Args:
        names: the files.
        key: where JSON and tables have their text.
        size: documents of a round; the last one of an epoch has the rest.
        skip_bad: records without a text are left out (and counted in ``bad``, by reason); otherwise the first ends the
            run.
        local: the path of a file, given its number and name.
    """

    def __init__(
        self,
        names: Sequence[str],
        key: str,
        size: int,
        skip_bad: bool,
        local: Callable[[int, str], str] = lambda number, name: name,
    ) -> None:
        self._names, self._key, self._size, self._skip_bad, self._local = names, key, size, skip_bad, local
        self.bad: dict[str, int] = {}
        self._reader: TextReader | None = None
        self._chunks: Iterator[Chunk] = iter(())
        self._texts: list[str] = []  # of the newest chunk, and how many of them were taken
        self._taken = 0
        self._at = _NOWHERE

    def round_at(self, mark: Mark) -> tuple[list[str], Mark]:
        """The documents of the round that begins at ``mark``, and where the next one begins (its ``cursor`` is not
        known here).

        Raises:
            UserError: a file is damaged, a record is bad, or there is no document in any file.
            OSError: a file cannot be read now.
        """
        if self._at != replace(mark, cursor=0):
            self._open(mark.file, mark.position, mark.skip)
        self._at = _NOWHERE  # until the round is whole
        file, texts = mark.file, list[str]()
        while len(texts) < self._size and file < len(self._names):
            found = self._texts[self._taken : self._taken + self._size - len(texts)]
            texts += found
            self._taken += len(found)
            if len(texts) < self._size and not self._next_chunk(file):
                file += 1
                if file < len(self._names):
                    self._open(file, 0, 0)
        if file == len(self._names):
            if not texts and mark.round == 0:
                raise UserError(f"{self._names[0]}: there is no document in the files of the stream")
            return texts, Mark(0, mark.epoch + 1)
        self._at = Mark(0, mark.epoch, mark.round + 1, file, self._position, self._taken)
        return texts, self._at

    def _open(self, file: int, position: int, skip: int) -> None:
        """Goes to ``skip`` documents behind ``position`` of a file."""
        self.close()
        path = self._local(file, self._names[file])
        with _complaints(self._names[file]):
            self._reader = open_text(path, self._key)
            self._reader.goto(position)
        self._chunks, self._next_position = self._reader.chunks(None), position
        self._position, self._texts, self._taken = position, [], 0
        while skip:
            if skip <= len(self._texts):
                self._taken = skip
                return
            skip -= len(self._texts)
            if not self._next_chunk(file):
                return

    def _next_chunk(self, file: int) -> bool:
        """The documents behind those of now; whether there are some."""
        assert self._reader is not None
        with _complaints(self._names[file]):
            chunk = next(self._chunks, None)
        self._position = self._next_position
        self._texts, self._taken = [], 0
        if chunk is None:
            return False
        if chunk.bad:
            self._refuse(file, chunk)
        self._next_position += chunk.input_bytes if self._reader.unit == "line" else chunk.records
        self._texts = chunk.texts
        return True

    def _refuse(self, file: int, chunk: Chunk) -> None:
        assert self._reader is not None
        for number, reason in chunk.bad:
            if not self._skip_bad:
                before = 0
                with open_text(self._reader.path, self._key) as reader:
                    before = reader.count_records(self._position)
                raise UserError(
                    f"--data-path stream: {self._names[file]}{place(self._reader, before + number + 1)}: {reason}; fix "
                    "it, or pass --stream-on-error skip"
                )
            kind = reason.partition(" (")[0]
            self.bad[kind] = self.bad.get(kind, 0) + 1

    def close(self) -> None:
        """Closes the open file."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


@contextmanager
def _complaints(name: str) -> Iterator[None]:
    """What a reader says of ``--input``, said of a stream's file."""
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix("--input ").removeprefix(f"{name}: ")
        raise UserError(f"--data-path stream: {name}: {text}") from error
