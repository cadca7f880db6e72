"""Manual pages: their roff source as text, one document each. What typesets is left away, the words stay.

The macros are those of man(7) and mdoc(7), the escapes those of groff(7).
"""

from __future__ import annotations

import os
import re
import shlex

from megaforge.data.corpus.readers.text import WholeTexts
from megaforge.data.corpus.records import TEXT
from megaforge.data.text.formats import plain_suffix

_SECTION = re.compile(r"\.[1-9][a-z]*")
_GLYPHS = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–", "hy": "-", "bu": "•",
    "co": "©", "rg": "®", "tm": "™", "mu": "×", "+-": "±", "->": "→", "<-": "←", "ha": "^", "ti": "~", "rs": "\\",
    "bv": "|", "ga": "`", "at": "@", "sh": "#", "sc": "§", "de": "°", "R": "®", "Tm": "™", "<=": "≤", ">=": "≥",
}  # fmt: skip
_ESCAPE = re.compile(
    r"\\(?:"
    r"f(?:\(..|\[[^]]*\]|.)"  # fonts
    r"|s(?:[-+]?\d|[-+]?\[[^]]*\]|\([-+]?\d\d)"  # sizes
    r"|[hvwlLm](?:'[^']*'|\[[^]]*\]|.)"  # movements, widths, colours
    r"|\*(?:\((?P<s2>..)|\[(?P<s>[^]]*)\]|(?P<s1>.))"  # strings
    r"|\((?P<g2>..)|\[(?P<g>[^]]*)\]"  # glyphs
    r"|(?P<c>.))"
)
_SINGLE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "´", "`": "`", ".": ".", "t": "\t"}
_HEADINGS, _BREAKS = ("SH", "SS", "Sh", "Ss"), ("PP", "P", "LP", "HP", "sp", "Pp", "br", "TP", "IP", "It", "RS", "RE")
# Requests whose arguments are not words of the page.
_UNSEEN = re.compile(
    r"(nr|ds|if|ie|el|de|am|ig|so|ft|ad|na|hy|nh|ne|ti|in|ta|tr|ll|pl|po|ps|vs|rm|rn|als|als1|fam|mso|do|cc|ec|eo|ev|"
    r"TH|Dd|Dt|Os|Bl|El|Bd|Ed|UC|AT|DT|PD|nf|fi|EX|EE|TS|TE|PS|PE|EQ|EN|UE|ME|SY|YS|OP|ce|ul|cu|bp|it|lf|ss|pc|nop)$"
)
# mdoc(7) macros that stand within a line; their arguments are the words.
_WITHIN = set(
    "Ad Ao Ac Ap Aq An Ar At Bc Bo Bq Brc Bro Brq Cd Cm D1 Dc Dl Do Dq Dv Ec Em En Eo Er Es Ev Fa Fl Fn Ft Ic In Li Lk "
    "Ms Mt Nm No Ns Oc Oo Op Ox Pa Pc Pf Po Pq Qc Ql Qo Qq Sc So Sq Sx Sy Ta Tn Va Vt Xc Xo Xr".split()
)
_ALTERNATING = ("BR", "RB", "BI", "IB", "IR", "RI")


class ManualPages(WholeTexts):
    """Files such as ``man1/ls.1.gz``."""

    suffixes = ()

    def reads(self, path: str) -> bool:
        """See :class:`Reader`: by the section in its name, in a directory of manual pages."""
        folder = os.path.basename(os.path.dirname(path))
        return folder.startswith("man") and _SECTION.fullmatch(plain_suffix(path)) is not None

    def kind(self, path: str) -> str:
        """See :class:`Reader`."""
        return TEXT

    def text(self, data: bytes) -> str:
        """See :class:`WholeTexts`."""
        return roff_to_text(super().text(data))


def roff_to_text(source: str) -> str:
    """The words of a manual page: headings, paragraphs and examples on lines of their own."""
    lines: list[str] = []
    filled, inside = True, False
    for line in source.replace("\\\n", "").split("\n"):
        if inside:  # a macro that the page defines
            inside = not line.startswith("..")
            continue
        if not line.startswith((".", "'")):
            text = _unescaped(line)
            lines.append(text if not filled or not text.startswith(" ") else f"\n{text}")
            continue
        name, _, rest = line[1:].lstrip().partition(" ")
        if name.startswith('\\"'):
            continue
        inside = name in ("de", "am", "ig")
        filled = (filled or name in ("fi", "EE", "Ed")) and name not in ("nf", "EX", "Bd")
        if name in _HEADINGS:
            lines.append(f"\n\n{_unescaped(' '.join(_words(rest)))}\n")
        elif name in _BREAKS:
            words = _words(rest)[:1] if name == "IP" else _words(rest) if name == "It" else []
            lines.append("\n" + _unescaped(" ".join(words)))
        elif not _UNSEEN.match(name):
            words = _without_macros([name, *_words(rest)]) if name in _WITHIN else _words(rest)
            lines.append(_unescaped(("" if name in _ALTERNATING else " ").join(words)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _words(rest: str) -> list[str]:
    """The arguments of a macro; quotes hold spaces together."""
    if '"' not in rest:
        return rest.split()
    reader = shlex.shlex(rest, posix=True, punctuation_chars=False)
    reader.whitespace_split, reader.quotes, reader.escape, reader.commenters = True, '"', "", ""
    try:
        return list(reader)
    except ValueError:  # a quote that does not end
        return rest.replace('"', "").split()


def _without_macros(words: list[str]) -> list[str]:
    """The words of a line of mdoc; ``Fl x`` is an option, ``-x``."""
    options = {number + 1 for number, word in enumerate(words) if word == "Fl"}
    return [f"-{word}" if number in options else word for number, word in enumerate(words) if word not in _WITHIN]


def _unescaped(line: str) -> str:
    line = re.sub(r'\\["#].*', "", line)
    return _ESCAPE.sub(_escape, line)


def _escape(match: re.Match[str]) -> str:
    glyph = match["g2"] or match["g"] or match["s2"] or match["s"]
    if glyph:
        code = re.fullmatch(r"u([0-9A-F]{4,6})", glyph)
        return chr(int(code[1], 16)) if code and int(code[1], 16) < 0x110000 else _GLYPHS.get(glyph, "")
    return _SINGLE.get(match["c"] or match["s1"] or "", "")
