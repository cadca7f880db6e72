"""What an input file is: told once, in one way, for every tool that reads text."""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Any

from megaforge.data.jsonl import LineReader
from megaforge.errors import UserError
from megaforge.json_text import parse_json

PROSE = frozenset(".txt .text .md .markdown .rst .rest .adoc .asciidoc .org .tex .bib .wiki .pod .man .srt".split())
_RECORDS = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = PROSE | {*_RECORDS, ".parquet", ".arrow"}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_BOM = b"\xef\xbb\xbf"
_OTHER_COMPRESSION = (".bz2", ".xz", ".lzma", ".lz4", ".zip", ".7z", ".z", ".br", ".tar", ".tgz", ".zstd")
_TO_LINES = "turn it into JSON Lines with tools/directory_to_jsonl.py"


class TextFormat(Enum):
    """How documents lie in a file."""

    LINES = "JSON Lines"
    TEXT = "text"
    PARQUET = "Parquet"
    ARROW = "Arrow"

    @property
    def is_table(self) -> bool:
        """Whether documents lie in rows."""
        return self in (TextFormat.PARQUET, TextFormat.ARROW)


def plain_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix in lower case, that of a compression left away: ``.jsonl`` of ``A.JSONL.gz``."""
    name = Path(path).name.lower()
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", name))[1]


def text_format(path: str) -> TextFormat:
    """The format of ``--input PATH``: by its suffix, in either case, and for other names by its content.

    Raises:
        UserError: the file is missing or damaged, or is something else: a directory, a JSON array, a dataset's
            ``.bin``, UTF-16, binary.
    """
    if os.path.isdir(path):
        raise UserError(f"--input {path} is a directory; gather its files with tools/directory_to_jsonl.py")
    suffix = plain_suffix(path)
    if suffix in _OTHER_COMPRESSION:
        raise UserError(f"--input {path}: {suffix} is not read; decompress it, or compress it with gzip or zstd")
    with LineReader(path) as reader:
        head = reader.head()
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return TextFormat.PARQUET
    if suffix == ".arrow" or head.startswith(b"ARROW1"):
        return TextFormat.ARROW
    if suffix in (".bin", ".idx") or head.startswith(b"MMIDIDX"):
        raise UserError(f"--input {path}: half of a dataset of tokens, where text is expected")
    named = suffix in _RECORDS
    if named or (suffix not in PROSE and _first_record(head) is not None):
        _check_lines(path, head)
        return TextFormat.LINES
    if suffix in PROSE:
        if holds_records(head):
            raise UserError(f"--input {path} holds JSON Lines under the name of a text; name it .jsonl")
    elif b"\0" in head and not head.startswith(_UTF16_MARKS):
        raise UserError(f"--input {path}: binary, neither text nor JSON Lines")
    return TextFormat.TEXT


def _check_lines(path: str, head: bytes) -> None:
    """Refuses what no other line of the file could make right."""
    if head.startswith(_UTF16_MARKS):
        raise UserError(f"--input {path}: UTF-16 or UTF-32, but JSON Lines are UTF-8; {_TO_LINES}")
    content = head.removeprefix(_BOM).lstrip()
    if content.startswith(b"[") and not _is_json(content.split(b"\n", 1)[0]):
        raise UserError(f"--input {path}: a JSON array over several lines, not JSON Lines; {_TO_LINES}")
    if content.startswith(b"[") and not content.partition(b"\n")[2].strip():
        raise UserError(f"--input {path}: one JSON array, not JSON Lines; {_TO_LINES}")
    if re.match(rb"\{\s*\n", content):
        raise UserError(f"--input {path}: a JSON object over several lines, not JSON Lines; {_TO_LINES}")


def _first_record(head: bytes) -> dict[str, Any] | None:
    """The object in the first line that is not empty, or None; one cut off by the head's end counts as empty."""
    line, end, _ = head.removeprefix(_BOM).lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return None
    if not end and re.match(rb'\{\s*"', line) and len(head) >= 1 << 12:
        return {}
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def holds_records(head: bytes) -> bool:
    """Whether a file begins with two JSON objects in two lines."""
    first, _, second = head.removeprefix(_BOM).lstrip().partition(b"\n")
    return _first_record(first + b"\n") is not None and _first_record(second) is not None


def _is_json(line: bytes) -> bool:
    try:
        _ = parse_json(line)
    except ValueError:
        return False
    return True
