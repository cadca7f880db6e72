"""Personal data that follows a pattern: mail addresses, phone numbers, social security numbers and IP addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.config.fields import flag
from megaforge.data.corpus.columns import any_of, matching, one_array, with_rows
from megaforge.data.corpus.records import replaced
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings

_AT, _DOT = r"(?:@|%40|\s?[\[(]\s?at\s?[\])]\s?)", r"(?:\.|\s?[\[(]\s?dot\s?[\])]\s?)"
_EMAIL = rf"(?i)[a-z0-9_](?:[a-z0-9._%+\-]*[a-z0-9_+\-])?{_AT}(?:[a-z0-9\-]+{_DOT})+[a-z]{{2,24}}\b"
# Area, group and serial number of the Social Security Administration: some were never given out.
_SSN = r"\b\d{3}([- ])\d{2}[- ]\d{4}\b|(?i:\bSSN|social security (?:number|no\.?))[:# ]{1,3}\d{9}\b"
# A trunk or country code, brackets or the words before it set a number apart from others of so many digits.
_PHONE = (
    r"(?:\+|\b00[1-9]\d{0,2}[-. \x{a0}/(])[1-9]\d{0,2}(?:[-. \x{a0}/]?\(?\d{1,5}\)?){2,6}\b"
    r"|\(\d{3,5}\)[-. \x{a0}]?\d{2,4}(?:[-. \x{a0}]?\d{2,4}){1,3}\b"
    r"|\b(?:1[-. ])?\d{3}[-.]\d{3}[-.]\d{4}\b"
    r"|\b(?:1 )?[2-9]\d{2} [2-9]\d{2} \d{4}\b"
    r"|(?i:\b(?:phone|tel|telephone|fax|mobile|call)\b)[.:]{0,2} ?\d[\d ().\-]{5,16}\d\b"
)
_IP = (
    r"\b(?:\d{1,3}\.){3}\d{1,3}\b|\b[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,35}[0-9a-fA-F:]"
    r"|(?i:::ffff:)(?:\d{1,3}\.){3}\d{1,3}"
)
# What makes four numbers a version or a section: words and signs before them (a list may stand between), or the names
# and marks of files and packages.
_NUMBERS = r"(?:v?\d+(?:\.\d+){1,3}(?:[,;/]| and| or| to| through| -)? {1,2})*"
_VERSION = re.compile(
    r"(?i)(?:\b(?:v|ver|versions?|releases?|revision|build|firmware|kernel|sections?|chapters?|updated? to|upgraded? to"
    rf"|since|until|before)\b[.\s:=\"'(]*|§\s*|[<>=~!]=\s*|\w-v?|[a-z]/){_NUMBERS}$"
)
_PACKAGE = re.compile(r"(?i)[-.+~_](?:[a-z]|\d+(?![\d.]))")


@dataclass(frozen=True)
class Kind:
    """One kind of personal data: its tag, the RE2 pattern that finds candidates, and which of these count."""

    tag: str
    pattern: str
    is_one: Callable[[re.Match[str]], bool] | None = None


def _is_ssn(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])[-9:]
    if match[1] is not None and match[0][6] != match[1]:
        return False
    if _within_number(match):
        return False
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def _is_phone(match: re.Match[str]) -> bool:
    digits = sum(character.isdigit() for character in match[0])
    fraction = re.search(r"\D\d$", match[0])
    return 7 <= digits <= 15 and fraction is None and not _within_number(match)


def _within_number(match: re.Match[str]) -> bool:
    """Whether the match is a part of a longer number or identifier."""
    text, start, end = match.string, match.start(), match.end()
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    return (
        bool(re.search(r"[\w=#][-.]?\Z|[.,/]\Z", before))
        and not re.search(r"[=:]\Z", before)
        or bool(re.match(r"[-.,/]?\d|[A-Za-z_]", after))
    )


def _is_ip(match: re.Match[str]) -> bool:
    text, start, end = match.string, match.start(), match.end()
    if re.match(r"\.?\d", text[end : end + 2]) or re.search(r"[\d.]", text[max(0, start - 1) : start]):
        return False  # five numbers: a section, an object identifier
    words = match[0]
    if ":" not in words and (_VERSION.search(text[max(0, start - 60) : start]) or _PACKAGE.match(text, end)):
        return False
    try:
        address = ipaddress.ip_address(words.rstrip(":") if not words.endswith("::") else words)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global


KINDS = {
    "email": Kind("<EMAIL>", _EMAIL),
    "ssn": Kind("<SSN>", _SSN, _is_ssn),
    "ip": Kind("<IP>", _IP, _is_ip),
    "phone": Kind("<PHONE>", _PHONE, _is_phone),
}


@dataclass(frozen=True)
class PiiSettings(StageSettings):
    """``pii``: personal data replaced by tags: <EMAIL>, <PHONE>, <SSN>, <IP> (global addresses only)."""

    kinds: tuple[str, ...] = flag(tuple(KINDS), "which are replaced", choices=tuple(KINDS))

    def open(self, scope: Scope) -> Pii:
        """See :class:`StageSettings`."""
        return Pii(self)


class Pii(RowStage):
    """Finds candidates in all rows by RE2, and replaces those that are of the kind in the rows that have any."""

    def __init__(self, settings: PiiSettings) -> None:
        self._kinds = [(name, KINDS[name]) for name in KINDS if name in settings.kinds]
        self._compiled = {name: re.compile(_python(kind.pattern)) for name, kind in self._kinds}

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        text = one_array(records["text"])
        found: list[list[str]] = [[] for _ in range(len(text))]
        counts: dict[str, int] = {}
        candidates = matching(text, any_of(*(kind.pattern for _, kind in self._kinds)))
        for name, kind in self._kinds:
            rows = matching(text, kind.pattern, candidates)
            if not rows.any():
                continue
            old = text.filter(pa.array(rows))
            new, numbers = self._replaced(name, kind, old)
            for row, number in zip(np.flatnonzero(rows).tolist(), numbers, strict=True):
                if number:
                    found[row].append(f"{number} {name}")
                    counts[name] = counts.get(name, 0) + number
            text = with_rows(text, rows, new)
        return Outcome(replaced(records, text=text), None, [", ".join(one) or None for one in found], counts)

    def _replaced(self, name: str, kind: Kind, texts: Any) -> tuple[Any, list[int]]:
        """The texts with tags, and how many each has."""
        is_one = kind.is_one
        if is_one is None:
            numbers = pc.count_substring_regex(texts, kind.pattern).to_pylist()
            return pc.replace_substring_regex(texts, kind.pattern, kind.tag), numbers
        compiled, new, numbers = self._compiled[name], [], []
        lines = pc.split_pattern(texts, "\n")
        every = lines.flatten()
        suspect = np.flatnonzero(matching(every, kind.pattern))
        bounds = lines.offsets.to_numpy() - lines.offsets[0].as_py()
        sizes = pc.utf8_length(every).to_numpy()
        places = np.concatenate([[0], np.cumsum(sizes + 1)])  # of each line, with the line feed that is not there
        own = np.searchsorted(suspect, bounds)
        for row, text in enumerate(texts.to_pylist()):
            hits = suspect[own[row] : own[row + 1]]
            starts = places[hits] - places[bounds[row]]
            found = _matches(text, starts.tolist(), (starts + sizes[hits]).tolist(), compiled)
            spans = [match.span() for match in found if is_one(match)]
            new.append(_with_tags(text, spans, kind.tag))
            numbers.append(len(spans))
        return new, numbers


def _matches(text: str, starts: list[int], ends: list[int], pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """The matches in the suspect lines, which begin and end there: what no pattern of numbers goes beyond."""
    for start, end in zip(starts, ends, strict=True):
        yield from pattern.finditer(text, start, end)


def _with_tags(text: str, spans: list[tuple[int, int]], tag: str) -> str:
    kept, at = [], 0
    for start, end in spans:
        kept += [text[at:start], tag]
        at = end
    return "".join([*kept, text[at:]])


def _python(pattern: str) -> str:
    """An RE2 pattern as one of Python's: code points are written otherwise."""
    return re.sub(r"\\x\{([0-9a-f]+)\}", lambda match: re.escape(chr(int(match[1], 16))), pattern)
