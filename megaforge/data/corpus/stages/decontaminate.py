"""Documents that hold text of held-out and evaluation files, found by runs of 13 words (Brown et al. 2020,
arXiv:2005.14165, appendix C)."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megaforge.config.fields import flag
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings
from megaforge.data.corpus.words import HashSet, plain_words
from megaforge.data.jsonl import LineReader
from megaforge.data.text.formats import TextFormat, plain_suffix, text_format
from megaforge.errors import UserError
from megaforge.json_text import parse_json


@dataclass(frozen=True)
class DecontaminateSettings(StageSettings):
    """``decontaminate``: documents with a run of words of evaluation files, whatever case and punctuation."""

    files: tuple[str, ...] = flag(
        (), "held-out and evaluation files: JSON Lines (every string in them) or text by lines"
    )
    ngram: int = flag(13, "words of a run that counts", least=4, most=64)
    least_words: int = flag(8, "words of the shortest line or string that is looked for, as a whole", least=1)
    most: int = flag(0, "different runs of one file that a document may hold and stay", least=0)

    def validate(self) -> None:
        """
        Raises:
            UserError: there are no files.
        """
        if not self.files:
            raise UserError("needs the files whose text is to be found: files: [FILE]")

    def inputs(self, scope: Scope) -> list[Path]:
        """See :class:`StageSettings`."""
        return [path for paths in self._found(scope).values() for path in paths]

    def _found(self, scope: Scope) -> dict[str, list[Path]]:
        """The files of each pattern, in order."""
        found = {}
        for pattern in self.files:
            found[pattern] = sorted(map(Path, glob.glob(str(scope.file(pattern)), recursive=True)))
            if not found[pattern]:
                raise UserError(f"files {pattern}: there is no such file (looked for {scope.file(pattern)})")
        return found

    def open(self, scope: Scope) -> Decontaminate:
        """See :class:`StageSettings`."""
        texts: list[str] = []
        owner: list[int] = []
        names: list[str] = []
        for pattern, paths in self._found(scope).items():
            for path in paths:
                found = list(_texts(str(path), pattern))
                owner += [len(names)] * len(found)
                texts += found
                names.append(path.name)
        stage = Decontaminate(self, names, texts, owner)
        if not stage.sizes:
            raise UserError(
                f"files {' '.join(self.files)}: no line or string has {self.least_words} words (least_words)"
            )
        return stage


def _texts(path: str, pattern: str) -> Iterator[str]:
    """The strings of an evaluation file."""
    try:
        kind = text_format(path)
    except UserError as error:
        raise UserError(str(error).replace("--input", "files", 1)) from error
    if kind.is_table:
        raise UserError(f"files {pattern}: {path} is a table; give JSON Lines or text")
    with LineReader(path) as reader:
        lines = kind is TextFormat.LINES or plain_suffix(path) in (".jsonl", ".ndjson", ".json")
        every = (line for chunk in reader.chunks(None) for line in chunk)
        for number, line in enumerate(every, 1):
            try:
                yield from _strings(parse_json(line)) if lines and line.strip() else [line.decode("utf-8")]
            except (ValueError, UnicodeDecodeError) as error:
                raise UserError(f"files {pattern}: {path}, line {number}: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


class Decontaminate(RowStage):
    """Looks for the hashes of runs of words. A line of fewer words than a run is looked for as a whole.

    Attributes:
        sizes: by the words of a run: the hashes that are looked for, and whose file each is.
    """

    def __init__(self, settings: DecontaminateSettings, names: list[str], texts: list[str], owner: list[int]) -> None:
        self._settings, self._names = settings, names
        words, files = plain_words(pa.array(texts, pa.large_string())), np.array(owner, np.int64)
        self.sizes: dict[int, tuple[HashSet, np.ndarray]] = {}
        for size in range(min(settings.least_words, settings.ngram), settings.ngram + 1):
            row, grams = words.ngrams(size)
            if size < settings.ngram:
                whole = words.counts[row] == size
                row, grams = row[whole], grams[whole]
            if len(grams):
                hashes, first = np.unique(grams, return_index=True)
                self.sizes[size] = HashSet(hashes), files[row[first]]
        self.too_short = int((words.counts < settings.least_words).sum())

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        words = plain_words(records["text"])
        found: list[tuple[int, int, int]] = []
        for size, (hashes, files) in self.sizes.items():
            row, grams = words.ngrams(size)
            hit, member = hashes.find(grams)
            found += set(zip(row[hit].tolist(), files[member].tolist(), member.tolist(), strict=True))
        times: dict[tuple[int, int], int] = {}
        for owner, file, _ in found:
            times[owner, file] = times.get((owner, file), 0) + 1
        reasons: list[str | None] = [None] * records.num_rows
        counts: dict[str, int] = {}
        for (owner, file), number in sorted(times.items()):
            if number > self._settings.most:
                name = self._names[file]
                reasons[owner] = reasons[owner] or f"text of an evaluation file ({name}, {number} runs of words)"
                counts[f"documents with text of {name}"] = counts.get(f"documents with text of {name}", 0) + 1
        return Outcome(records, reasons, counts=counts)
