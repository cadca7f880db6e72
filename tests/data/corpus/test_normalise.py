"""Normalisation and the text of pages, on texts whose right form is known."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from megaforge.data.corpus.records import CODE, HTML, TEXT, make_records
from megaforge.data.corpus.stage import Outcome, Scope, check_outcome
from megaforge.data.corpus.stages.html import HtmlSettings
from megaforge.data.corpus.stages.normalise import NormaliseSettings

ftfy = pytest.importorskip("ftfy", reason="needs the corpus extra")

SCOPE = Scope(Path("."))
GOOD = (
    "Un café très élégant à Genève, où l’on mange bien — «déjà vu».",
    "Größe und Übermut führen über die Straße.",
    "Привет, как дела? Это обычный русский текст: РОССИЯ, СССР, РСФСР.",
    "日本語の文章です。漢字とかな。",
    "هذا نص عربي مع \u200c و \u200d",
    "👩\u200d👧 emoji with joiners 👍🏽",
    "plain ASCII, 3 < 4 && x[0] == '\\x00'",
    "Ÿ» Ã is a letter; SÃO PAULO, MAÇÃ.",
)


def apply(settings: Any, texts: list[str], **columns: Any) -> Outcome:
    records = make_records(texts, **columns)
    outcome = settings.open(SCOPE).apply(records)
    check_outcome(outcome, len(texts), type(settings).__name__)
    return outcome


def texts_of(outcome: Outcome) -> list[str]:
    return outcome.records["text"].to_pylist()


def test_good_text_stays_as_it_is() -> None:
    outcome = apply(NormaliseSettings(), [*GOOD, "", "\n"])
    assert texts_of(outcome) == [*GOOD, "", "\n"]
    assert set(outcome.reasons or ()) == {None} and set(outcome.rewrites or ()) == {None} and not outcome.counts


@pytest.mark.parametrize("page", ["cp1252", "latin-1"])
def test_utf8_that_was_read_otherwise_is_mended(page: str) -> None:
    spoilt, right = [], []
    for text in ("Un café très élégant à Genève", "Größe über alles, naïve Übung", "l’été – “déjà”"):
        try:
            spoilt.append("fine here\n" + text.encode().decode(page) + "\nfine there, ASCII")
        except UnicodeDecodeError:
            continue
        right.append(f"fine here\n{text}\nfine there, ASCII")
    outcome = apply(NormaliseSettings(), spoilt)
    assert [ftfy.fix_text(text) for text in right] and len(right) >= 2
    assert texts_of(outcome) == right
    assert outcome.counts["mended encoding"] == len(right) and (outcome.rewrites or ())[0] == "mended encoding"
    assert texts_of(apply(NormaliseSettings(mojibake=False), spoilt)) != right


def test_line_ends_controls_composition_and_spaces() -> None:
    rough = "a\r\nb\rc\fd\u0085e\u2028f\x00g\u200bh\ufeffi\x07j\u00adk\u202el e\u0301 \t\n\n\n\n\n\nend  "
    outcome = apply(NormaliseSettings(), [rough])
    assert texts_of(outcome) == ["a\nb\nc\nd\ne\nfghijkl \u00e9\n\n\nend"]
    assert set((outcome.rewrites or ())[0].split(", ")) == {  # type: ignore[union-attr]
        "line ends",
        "control characters",
        "composed Unicode",
        "spaces",
    }


def test_spaces_of_code_stay() -> None:
    code = "x = '''  \n\n\n\n\n\n'''\n"
    outcome = apply(NormaliseSettings(), [code, code], kind=[CODE, TEXT])
    assert texts_of(outcome) == [code, "x = '''\n\n\n'''\n"]
    assert outcome.counts == {"spaces": 1}


def test_random_text_is_composed_and_twice_is_once() -> None:
    source = random.Random(3)
    alphabet = "ab \n\t\r\f\x00\x1b\u0300\u0301\u00e9\u0085\u200b\u200d\ufeff\U0001f600\u212b\u1100\u1161Ã©â€™"
    rough = ["".join(source.choices(alphabet, k=source.randint(0, 40))) for _ in range(400)]
    once = texts_of(apply(NormaliseSettings(mojibake=False, most_lost=1.0), rough))
    assert all(unicodedata.is_normalized("NFC", text) for text in once)
    assert not any(set(text) & set("\r\f\x00\x1b\u0085\u200b\ufeff") for text in once)
    assert texts_of(apply(NormaliseSettings(mojibake=False, most_lost=1.0), once)) == once


def test_lost_characters() -> None:
    outcome = apply(NormaliseSettings(), ["x" * 3000 + "\ufffd", "ab\ufffd"])
    assert outcome.reasons == [None, "characters were lost (1 of 3)"]


PAGE = """<html><head><title>t</title><style>.a{color:red}</style><script>var tracking = 1;</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/shop">Shop now</a></li></ul></nav>
<div class="cookie-banner">We use cookies. Accept all.</div>
<article><h1>On rivers</h1><p>The river rises in the hills and runs for two hundred miles to the sea.</p>
<p>Its water is cold &amp; clear, and the fish that live in it are small.</p><pre>keep   this
  code</pre></article>
<footer>Copyright 2020 Example Inc. All rights reserved. Privacy policy</footer></body></html>"""


def test_main_content_of_pages() -> None:
    outcome = apply(
        HtmlSettings(),
        [PAGE, "<p>left alone</p>", "<html><body><p>Only this.</p></body></html>", ""],
        kind=[HTML, TEXT, HTML, HTML],
    )
    text, same, small, empty = texts_of(outcome)
    for kept in ("On rivers", "two hundred miles", "cold & clear", "keep   this\n  code"):
        assert kept in text
    for gone in ("Shop now", "cookies", "tracking", "Copyright", "color"):
        assert gone not in text
    assert same == "<p>left alone</p>" and small.strip() == "Only this." and not empty
    assert outcome.records["kind"].to_pylist() == [TEXT] * 4
    assert outcome.reasons == [None, None, None, "a page without text"]
    whole = texts_of(apply(HtmlSettings(main_content=False), [PAGE], kind=HTML))[0]
    assert "Shop now" in whole and "tracking" not in whole


def test_lines_are_mended_among_others() -> None:
    """As by mending every line: lines of any kind, texts with some that are spoilt, and texts without."""
    source = random.Random(5)
    pages = (("Un café très", "cp1252"), ("Größe", "latin-1"), ("l’été", "cp1252"))
    spoilt = [text.encode().decode(page) for text, page in pages]
    lines = [*GOOD, "", "ASCII alone", " ", *spoilt]
    texts = ["\n".join(source.choices(lines, k=source.randint(1, 9))) for _ in range(80)]
    outcome = apply(NormaliseSettings(spaces=False), texts)
    right = ["\n".join(ftfy.fix_encoding(line) for line in text.split("\n")) for text in texts]
    right = [unicodedata.normalize("NFC", text.replace("\u0085", "\n")) for text in right]
    assert texts_of(outcome) == right
    is_changed = [one is not None for one in outcome.rewrites or ()]
    assert is_changed == [one != other for one, other in zip(texts, right, strict=True)]
    assert 5 < sum(is_changed) < 75


def test_what_composes_is_composed_and_nothing_else() -> None:
    """Every kind of code point that NFC changes, and neighbours that it does not, against Python's own."""
    parts = "e\u0301 \u212b \u1100\u1161 \ud55c \uf900 \u0958 q\u0301 \u0344 a\u0328\u0301 漢 \u0301".split()
    texts = [f"{one}{other} x" for one in parts for other in parts] + ["ASCII"]
    assert texts_of(apply(NormaliseSettings(), texts)) == [unicodedata.normalize("NFC", text) for text in texts]
