"""Heuristics, quality and blocklists on text of known worth."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megaforge.data.corpus.records import CODE, make_records
from megaforge.data.corpus.stage import Outcome, Scope, check_outcome
from megaforge.data.corpus.stages.blocklist import BlocklistSettings
from megaforge.data.corpus.stages.heuristics import HeuristicsSettings
from megaforge.data.corpus.stages.quality import LEAST, QualitySettings
from megaforge.errors import UserError

SCOPE = Scope(Path("."))
GOOD = {
    "prose": "The river rises in the hills and runs for two hundred miles to the sea. Its water is cold and clear, and "
    "the fish that live in it are small. In the spring, when the snow melts, it floods the meadows on both its banks.",
    "german": "Der Fluss entspringt in den Hügeln und fließt zweihundert Meilen weit bis an das Meer. Sein Wasser ist "
    "kalt und klar, und die Fische darin sind klein. Im Frühling überschwemmt er die Wiesen auf beiden Seiten.",
    "japanese": "川は丘から流れ出て、二百マイル先の海まで続いている。水は冷たく澄んでいて、そこに住む魚は小さい。"
    "春になると、雪が溶けて両岸の草地があふれる。",
    "dialogue": '"Where are you going?" she asked. "To the market," he said, "and then to see my brother." She did not '
    "answer him, but took her coat from the chair and followed. It was late when they came to the town.",
}
BAD = {
    "symbols": "the river | and {hills} <the> meadow ### with == cold ++ water // small ** fish ~~ $who @me ^no \\go",
    "numbers": " ".join(str(number * 7919 % 100003) for number in range(200)),
    "keywords": "cheap flights cheap hotels cheap flights london cheap hotels paris " * 20,
    "shouting": "BUY NOW BEST PRICE LIMITED OFFER CLICK HERE FREE SHIPPING ORDER TODAY SAVE BIG HUGE DISCOUNT DEAL "
    * 2,
    "repeated": "This line is there again and again, and it says nothing that was not said.\n" * 30,
    "base64": " ".join(
        "".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyzABCDEFXYZ0123456789+/", k=64)) for n in range(20)
    ),
    "menu": "Home\nProducts\nShop\nContact\nLogin\nRegister\nCart\nSearch\nNews\nBlog\nFAQ\nTerms\nJobs",
    "dots": "Introduction ........ 1 ........ 2 ........ Chapter ....... 3 ...... 4 ...... Index ...... 5 . End 6 ..",
}


def apply(settings: Any, texts: list[str], scope: Scope = SCOPE, **columns: Any) -> Outcome:
    outcome = settings.open(scope).apply(make_records(texts, **columns))
    check_outcome(outcome, len(texts), type(settings).__name__)
    return outcome


def languages(names: dict[str, str]) -> list[str]:
    return [{"german": "de", "japanese": "ja"}.get(name, "en") for name in names]


def test_heuristics_keep_text_and_drop_the_rest_for_a_reason_each() -> None:
    good = apply(HeuristicsSettings(), list(GOOD.values()), language=languages(GOOD))
    assert dict(zip(GOOD, good.reasons or (), strict=True)) == dict.fromkeys(GOOD)
    bad = dict(zip(BAD, apply(HeuristicsSettings(), list(BAD.values()), language="en").reasons or (), strict=True))
    assert {name: (reason or "kept").split(" (")[0] for name, reason in bad.items()} == {
        "symbols": "many symbols",
        "numbers": "many digits",
        "keywords": "few stop words",
        "shouting": "many capitals",
        "repeated": "repeated lines",
        "base64": "long words",
        "menu": "few stop words",
        "dots": "much punctuation",
    }


def test_heuristics_of_code_and_edges() -> None:
    code = "for (i = 0; i < n; ++i) { a[i] += b[i] * c[j]; }\n"
    outcome = apply(HeuristicsSettings(), [code, code * 50, "", "x", "1"], kind=[CODE, CODE, "text", "text", "text"])
    assert [None if reason is None else reason.split(" (")[0] for reason in outcome.reasons or ()] == [
        None,
        "repeated lines",
        "few words",
        "few words",
        "few words",
    ]
    with pytest.raises(UserError, match="least_word_length 9.0: must be at most most_word_length, 3.0"):
        HeuristicsSettings(least_word_length=9.0, most_word_length=3.0).validate()


def test_quality_sorts_good_from_bad_and_says_why() -> None:
    names = [*GOOD, *BAD]
    texts = [*GOOD.values(), *BAD.values()]
    outcome = apply(QualitySettings(least=0.6), texts, language=[*languages(GOOD), *["en"] * len(BAD)])
    scores = dict(zip(names, outcome.records["quality"].to_pylist(), strict=True))
    assert all(0 <= score <= 1 for score in scores.values())
    assert min(scores[name] for name in GOOD) > 0.85, scores
    assert max(scores[name] for name in BAD) < 0.6, scores
    assert all(reason is None for reason in (outcome.reasons or ())[: len(GOOD)])
    why = dict(zip(names, outcome.reasons or (), strict=True))
    assert "repeated lines" in str(why["repeated"]) and "digits" in str(why["numbers"])
    assert sum(number for name, number in outcome.counts.items() if name.startswith("quality")) == len(texts)
    assert any(name.startswith("held back most by") for name in outcome.counts)


def test_the_threshold_is_that_of_the_models_size() -> None:
    assert [QualitySettings().open(Scope(Path("."), scale)).least for scale in LEAST] == [0.4, 0.5, 0.7, 0.8]
    assert QualitySettings().open(SCOPE).least == 0.6
    assert QualitySettings(least=0.1).open(Scope(Path("."), "200b")).least == 0.1


def test_documentation_is_kept() -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    texts = [text for text in topics.values() if len(text) >= 50]
    language = ["en"] * len(texts)
    outcome = apply(QualitySettings(), texts, language=language)
    dropped = sum(reason is not None for reason in outcome.reasons or ())
    assert len(texts) > 60 and dropped <= 0.05 * len(texts), outcome.reasons
    dropped = sum(reason is not None for reason in apply(HeuristicsSettings(), texts, language=language).reasons or ())
    assert dropped <= 0.05 * len(texts)


def test_blocklist(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# ours\nsnark\nBad  Phrase\n漢字\n\n", encoding="utf-8")
    (tmp_path / "hosts.txt").write_text("example.org\nwww.bad.example\n")
    scope = Scope(tmp_path)
    texts = ["a Snark!", "snarky", "bad, phrase", "bad. A phrase", "SNARK snark", "see 漢字 here", "", "fine"]
    outcome = apply(BlocklistSettings(words=("words.txt",)), texts, scope)
    assert [reason is not None for reason in outcome.reasons or ()] == [
        True,
        False,
        True,
        False,
        True,
        True,
        False,
        False,
    ]
    assert (outcome.reasons or ())[2] == "words of the blocklist (1, such as 'Bad  Phrase')"
    outcome = apply(BlocklistSettings(words=("words.txt",), most=1), texts, scope)
    assert [row for row, reason in enumerate(outcome.reasons or ()) if reason] == [4]
    urls = ["https://news.example.org/a", "https://example.organic", "http://bad.example:80/", None, "notanurl"]
    outcome = apply(BlocklistSettings(hosts=("hosts.txt",)), ["t"] * 5, scope, url=urls)
    assert outcome.reasons == [
        "a host of the blocklist (example.org)",
        None,
        "a host of the blocklist (bad.example)",
        None,
        None,
    ]


def test_blocklists_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "punctuation.txt").write_text("...\n")
    with pytest.raises(UserError, match="needs a list"):
        BlocklistSettings().validate()
    for name, words in (
        ("missing.txt", "cannot read it"),
        ("empty.txt", "lists nothing"),
        ("punctuation.txt", "no word"),
    ):
        with pytest.raises(UserError, match=f"words {name}: .*{words}"):
            BlocklistSettings(words=(name,)).open(Scope(tmp_path))
