"""Answers that were given before, in a file of JSON lines: appended as they are known, so that an evaluation that was
stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megaforge.checkpoint.manifest import sums_digest
from megaforge.errors import UserError
from megaforge.inference.requests import Answer, Request, Scored, key_of
from megaforge.json_text import parse_json


def identity(path: str | os.PathLike[str], *choices: object) -> str:
    """What tells one model's answers from another's: the content of its checkpoint or file, and ``choices`` of how it
    computes."""
    path = Path(path)
    if path.is_dir():
        content = sums_digest(path)
    else:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps([content, *choices])


class AnswerCache:
    """The answers of one model in a file that many may share."""

    def __init__(self, path: str, model: str) -> None:
        """Reads the file, if it is there.

        Args:
            model: from :func:`identity`.

        Raises:
            UserError: it cannot be read or written, or holds something else.
        """
        self.path, self._model = Path(path), model
        self._known: dict[str, Answer] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._end = self._read(self.path.read_bytes() if self.path.exists() else b"")
            self._file = open(self.path, "r+b" if self.path.exists() else "w+b")
        except OSError as error:
            raise UserError(f"--cache {path}: cannot be used ({error.strerror})") from error
        self._file.truncate(self._end)  # a line that a killed process has not finished
        self._file.seek(self._end)

    def _read(self, data: bytes) -> int:
        """Takes in all whole lines; where they end."""
        end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                key, answer = parse_json(line)
                self._known[key] = answer if isinstance(answer, str) else Scored(float(answer[0]), bool(answer[1]))
            except (ValueError, TypeError, IndexError) as error:
                raise UserError(
                    f"--cache {self.path}: line {number} is no answer of an evaluation; name another file"
                ) from error
        if data and not end:
            raise UserError(f"--cache {self.path}: holds no answers of an evaluation; name another file")
        return end

    def find(self, request: Request) -> Answer | None:
        """The answer that was given to it, or None."""
        return self._known.get(key_of(self._model, request))

    def keep(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Adds answers; a process that is killed afterwards has not lost them."""
        for request, answer in zip(requests, answers, strict=True):
            key = key_of(self._model, request)
            self._known[key] = answer
            self._file.write(json.dumps([key, answer]).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the writing."""
        self._file.close()
