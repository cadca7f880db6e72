"""Documents that hold words or phrases of a list of the user's, or come from hosts of one. None is shipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megaforge.config.fields import flag
from megaforge.data.corpus.addresses import host_of
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings
from megaforge.data.corpus.words import HashSet, plain_words
from megaforge.errors import UserError


@dataclass(frozen=True)
class BlocklistSettings(StageSettings):
    """``blocklist``: words, phrases and hosts that you list, one a line; a line that begins with # is a comment."""

    words: tuple[str, ...] = flag((), "files of words and phrases, whatever their case and the spaces between")
    hosts: tuple[str, ...] = flag((), "files of hosts; example.org is also news.example.org")
    most: int = flag(0, "times that listed words may occur in a document that stays", least=0)

    def validate(self) -> None:
        """
        Raises:
            UserError: there is no list.
        """
        if not (self.words or self.hosts):
            raise UserError("needs a list: words: [FILE] or hosts: [FILE]")

    def inputs(self, scope: Scope) -> list[Path]:
        """See :class:`StageSettings`."""
        return [scope.file(name) for name in (*self.words, *self.hosts)]

    def open(self, scope: Scope) -> Blocklist:
        """See :class:`StageSettings`."""
        phrases = [line for name in self.words for line in _lines(scope, "words", name)]
        hosts = [line.lower().removeprefix("www.") for name in self.hosts for line in _lines(scope, "hosts", name)]
        return Blocklist(self.most, phrases, frozenset(hosts))


def _lines(scope: Scope, key: str, name: str) -> list[str]:
    try:
        text = scope.file(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{key} {name}: cannot read it: {why} (looked at {scope.file(name)})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise UserError(f"{key} {name}: it lists nothing; expected one a line")
    if key == "words":
        for line, count in zip(lines, plain_words(pa.array(lines, pa.large_string())).counts.tolist(), strict=True):
            if not count:
                raise UserError(f"{key} {name}: {line!r} holds no word; remove it or put # before it")
    return lines


class Blocklist(RowStage):
    """Finds phrases by the hashes of their words."""

    def __init__(self, most: int, phrases: list[str], hosts: frozenset[str]) -> None:
        self._most, self._hosts = most, hosts
        listed = plain_words(pa.array(phrases, pa.large_string()))
        self._hashes: dict[int, tuple[HashSet, list[str]]] = {}
        for size in sorted(set(listed.counts.tolist()) - {0}):
            row, grams = listed.ngrams(size)
            whole = listed.counts[row] == size
            order = np.argsort(grams[whole], kind="stable")
            self._hashes[size] = HashSet(grams[whole][order]), [phrases[one] for one in row[whole][order]]

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        reasons: list[str | None] = [self._host(url) for url in records["url"].to_pylist()]
        if not self._hashes:
            return Outcome(records, reasons)
        words = plain_words(records["text"])
        times = np.zeros(records.num_rows, np.int64)
        example: dict[int, str] = {}
        for size, (hashes, phrases) in self._hashes.items():
            row, grams = words.ngrams(size)
            hit, member = hashes.find(grams)
            times += np.bincount(row[hit], minlength=len(times))
            for one, phrase in zip(row[hit].tolist(), member.tolist(), strict=True):
                example.setdefault(one, phrases[phrase])
        for one in np.flatnonzero(times > self._most).tolist():
            reasons[one] = reasons[one] or f"words of the blocklist ({times[one]}, such as {example[one]!r})"
        return Outcome(records, reasons)

    def _host(self, url: str | None) -> str | None:
        host = host_of(url) if url and self._hosts else ""
        parts = host.split(".")
        for begin in range(len(parts)):
            if (name := ".".join(parts[begin:])) in self._hosts:
                return f"a host of the blocklist ({name})"
        return None
