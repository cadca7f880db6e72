"""HTML pages: one document each, as markup, for the stage ``html`` to take the text from."""

from __future__ import annotations

import re

from megaforge.data.corpus.decode import decode
from megaforge.data.corpus.readers.text import WholeTexts
from megaforge.data.corpus.records import HTML

_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([-\w]+)", re.IGNORECASE)
_HEAD = 4096
# What browsers take these names for (WHATWG Encoding Standard).
_WIDER = {"iso-8859-1": "cp1252", "latin1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252", "gb2312": "gbk"}


class HtmlPages(WholeTexts):
    """Pages in the encoding that they declare, where they are not UTF-8."""

    suffixes = (".htm", ".html", ".xhtml")

    def kind(self, path: str) -> str:
        """See :class:`Reader`."""
        return HTML

    def text(self, data: bytes) -> str:
        """See :class:`WholeTexts`."""
        found = _CHARSET.search(data[:_HEAD])
        if found is None or _is_utf8(data):
            return decode(data)
        name = found[1].decode("ascii").lower()
        try:
            return data.decode(_WIDER.get(name, name)).replace("\r\n", "\n")
        except (LookupError, UnicodeDecodeError):
            return decode(data)  # the declaration is wrong


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
