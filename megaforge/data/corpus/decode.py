"""Bytes of a text file to text: byte order marks, UTF-8, a source file's own declaration, then detection."""

from __future__ import annotations

import codecs
import re

from megaforge.errors import require

# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DECLARATION = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_DETECTION_BYTES = 1 << 18


class NotText(Exception):
    """The bytes are not text that can be decoded; the message says why."""


def decode(data: bytes) -> str:
    """The text of a file, with ``\\n`` line ends and no byte order mark.

    Tried in turn: a byte order mark, UTF-8, an Emacs- or Python-style ``coding:`` comment in the first two lines
    (PEP 263), and detection by ``resiliparse``.

    Raises:
        NotText: the bytes look binary, or no encoding fits them.
        UserError: detection is needed and its library is not installed.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _decode_as(data[len(mark) :], encoding)
    if b"\0" in data:
        raise NotText("binary (it holds NUL bytes)")
    try:
        return _line_ends(data.decode("utf-8"))
    except UnicodeDecodeError:
        declared = _declared(data)
    if declared is not None:
        return _decode_as(data, declared)
    detection = require("resiliparse.parse.encoding", extra="data", purpose="detecting a file's encoding")
    found = detection.detect_encoding(data[:_DETECTION_BYTES], html5_compatible=False)
    if found is None or found in ("ascii", "utf-8"):
        raise NotText("no encoding fits its bytes")
    text = _decode_as(data, found)
    if sum(ord(character) < 32 and character not in "\t\n\f\v\x1b" for character in text) > len(text) // 100:
        raise NotText("binary (it is full of control characters)")
    return text


def _declared(data: bytes) -> str | None:
    for line in data.split(b"\n", 2)[:2]:
        match = _DECLARATION.match(line)
        if match:
            return match.group(1).decode("ascii")
    return None


def _decode_as(data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding)
        text.encode()  # some encodings that a file may declare give half characters, which no JSON can hold
        return _line_ends(text)
    except (UnicodeError, LookupError) as error:
        raise NotText(f"not decodable as {encoding} ({error})") from error


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
