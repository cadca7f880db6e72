"""What a tool leaves out is counted and named: a line a reason on the console, every instance in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megaforge.durable import replacing
from megaforge.errors import UserError


class LeftOut:
    """Inputs without a place in the output, each with its reason.

    A reason may end in details, `` (...)``; those with the same words before them are counted together.
    """

    def __init__(self, entries: Iterable[tuple[str, str]] = ()) -> None:
        self.entries: list[tuple[str, str]] = []
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}
        for where, reason in entries:
            self.add(where, reason)

    def add(self, where: str, reason: str) -> None:
        """Takes note of one."""
        self.entries.append((where, reason))
        self.count(kind_of(reason), 1, f"{where}{reason.removeprefix(kind_of(reason))}")

    def count(self, kind: str, number: int, example: str = "") -> None:
        """Adds ``number`` of a kind without naming each."""
        self._counts[kind] = self._counts.get(kind, 0) + number
        if example:
            self._examples.setdefault(kind, example)

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self._counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind, the most frequent first."""
        return dict(sorted(self._counts.items(), key=lambda item: -item[1]))

    def summary(self) -> list[str]:
        """A line a reason: how many, why, and one of them."""
        return [
            f"left out {number:,}: {kind}; for example {self._examples.get(kind, '?')}"
            for kind, number in self.counts.items()
        ]

    def write(self, output: str) -> str | None:
        """Writes every instance into ``OUTPUT.skipped.tsv``, a line each, and returns its path; without any, removes
        what an earlier run left there.

        Raises:
            UserError: it cannot be written.
        """
        path = Path(details_path(output))
        try:
            if not self.entries:
                path.unlink(missing_ok=True)
                return None
            lines = ["\t".join(map(_one_line, entry)) + "\n" for entry in self.entries]
            with replacing(path, f"{path}.tmp-{os.getpid()}") as temporary:
                temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return str(path)


def details_path(output: str) -> str:
    """Where the instances are listed."""
    return f"{output}.skipped.tsv"


def kind_of(reason: str) -> str:
    """The reason without its details."""
    return reason.partition(" (")[0]


def _one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
