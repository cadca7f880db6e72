"""One form for the same text: mended encoding, one kind of line end, no control characters, composed Unicode."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.config.fields import flag
from megaforge.data.corpus.columns import any_of, flat_bytes, matching, one_array, rewritten, with_rows
from megaforge.data.corpus.records import CODE, replaced
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings
from megaforge.errors import require

_HIGH = "\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d\u2018\u2019"
_HIGH += "\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178"
# UTF-8 that was read as a Western or a Cyrillic code page: a lead byte's letter, then a continuation byte's character.
SUSPECT = f"[\u00c2-\u00f4][{_HIGH}]|(?:[\u0420\u0421][^ -~\\s]){{4}}"
_LINE_ENDS = "\r\n?|\f|\u0085|\u2028|\u2029"
# C0 but tab and line feed, DEL, C1, soft hyphens, zero-width and direction marks, byte order marks; joiners stay, which
# emoji and several scripts are written with.
_CONTROL = (
    "[\x01-\x08\x0b\x0e-\x1f\x7f-\u009f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|\\x00"
)
_LOST = "\ufffd"
_ODD = any_of(SUSPECT, _LINE_ENDS, _CONTROL, _LOST)
_SUSPECT = re.compile(SUSPECT)
_TRAILING = "[ \t]+(\n|$)"
_BLANKS = "\n{4,}"
_LEAST_COMBINING = 0xCC  # the first byte of U+0300; text below it is composed


@dataclass(frozen=True)
class NormaliseSettings(StageSettings):
    """``normalise``: encodings, line ends, control characters, Unicode's composed form (NFC)."""

    mojibake: bool = flag(True, "mend UTF-8 that was read as another encoding, where a line looks like it (ftfy)")
    spaces: bool = flag(True, "remove spaces at line ends and blank lines beyond two; never in code")
    most_lost: float = flag(0.001, "share of U+FFFD characters above which a document is dropped", least=0, most=1)

    def open(self, scope: Scope) -> Normalise:
        """See :class:`StageSettings`."""
        ftfy = require("ftfy", extra="corpus", purpose="stage normalise: mojibake true") if self.mojibake else None
        return Normalise(self, ftfy)


class Normalise(RowStage):
    """Rewrites texts into one form; drops those whose characters were lost before."""

    def __init__(self, settings: NormaliseSettings, ftfy: ModuleType | None) -> None:
        self._settings, self._ftfy = settings, ftfy

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        text, made = one_array(records["text"]), {}
        odd = matching(text, _ODD)
        if self._ftfy is not None:
            text, made["mended encoding"] = self._mended(text, odd)
        text, made["line ends"] = rewritten(text, _LINE_ENDS, "\n", odd)
        text, made["control characters"] = rewritten(text, _CONTROL, "", odd)
        text, made["composed Unicode"] = _composed(text)
        if self._settings.spaces:
            text, made["spaces"] = _without_spaces(text, records["kind"])
        reasons = self._lost(text, odd)
        names = list(made)
        rows = np.stack(list(made.values()), axis=1)
        rewrites = [", ".join(names[i] for i in np.flatnonzero(row)) or None for row in rows]
        counts = {name: int(changed.sum()) for name, changed in made.items() if changed.any()}
        return Outcome(replaced(records, text=text), reasons, rewrites, counts)

    def _lost(self, text: Any, among: np.ndarray) -> list[str | None]:
        """Why texts are dropped that lost characters before they were read; the others of the mask lost none."""
        reasons: list[str | None] = [None] * len(text)
        some = text.filter(pa.array(among))
        lost, length = pc.count_substring(some, _LOST).to_pylist(), pc.utf8_length(some).to_pylist()
        for row, one, of in zip(np.flatnonzero(among).tolist(), lost, length, strict=True):
            if one > self._settings.most_lost * of:
                reasons[row] = f"characters were lost ({one:,} of {of:,})"
        return reasons

    def _mended(self, text: Any, among: np.ndarray) -> tuple[Any, np.ndarray]:
        """The texts with the lines mended that look as if they were read wrongly, and which texts have some."""
        assert self._ftfy is not None
        rows = matching(text, SUSPECT, among)
        if not rows.any():
            return text, rows
        old = text.filter(pa.array(rows))
        split = pc.split_pattern(old, "\n")
        lines = split.flatten()
        suspect = matching(lines, SUSPECT)
        mended = [
            self._ftfy.fix_encoding(line) if _SUSPECT.search(line) else line
            for line in lines.filter(pa.array(suspect)).to_pylist()
        ]
        joined = pa.ListArray.from_arrays(split.offsets, with_rows(lines, suspect, mended))
        new = pc.binary_join(joined, pa.scalar("\n", pa.large_string()))
        changed = rows.copy()
        changed[rows] = pc.not_equal(old, new).to_numpy(zero_copy_only=False)
        return with_rows(text, rows, new), changed


def _composed(text: Any) -> tuple[Any, np.ndarray]:
    data, offsets = flat_bytes(text)
    rows = np.zeros(len(text), bool)
    places = np.flatnonzero(data >= _LEAST_COMBINING)
    places = places[~_is_drawn(data, places)]
    rows[np.searchsorted(offsets, places, side="right") - 1] = True
    if not rows.any():
        return text, rows
    # The library composes every character anew; to see that nothing is to be composed is many times faster.
    texts = text.filter(pa.array(rows)).to_pylist()
    rows[rows] = [not unicodedata.is_normalized("NFC", one) for one in texts]
    if not rows.any():
        return text, rows
    old = text.filter(pa.array(rows))
    new = pc.utf8_normalize(old, form="NFC")
    changed = rows.copy()
    changed[rows] = pc.not_equal(old, new).to_numpy(zero_copy_only=False)
    return with_rows(text, rows, new), changed


def _is_drawn(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which of the characters are of general punctuation (but U+2000 and U+2001), boxes, blocks and shapes, which
    compose with nothing."""
    second, third = (data[np.minimum(places + step, len(data) - 1)] for step in (1, 2))
    drawn = (second == 0x80) & (third >= 0x82) | (second >= 0x94) & (second <= 0x97)
    return np.asarray((data[places] == 0xE2) & drawn)


def _without_spaces(text: Any, kind: Any) -> tuple[Any, np.ndarray]:
    prose = pc.not_equal(kind, CODE).to_numpy().astype(bool)
    spaced = matching(text, any_of(_TRAILING, _BLANKS), prose)
    text, trailing = rewritten(text, _TRAILING, r"\1", spaced)
    text, blanks = rewritten(text, _BLANKS, "\n\n\n", spaced)
    return text, trailing | blanks
