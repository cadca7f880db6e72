"""Repeated paragraphs, templates, and text of evaluation files, all planted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megaforge.data.corpus.records import CODE, make_records
from megaforge.data.corpus.stage import Outcome, Scope, check_outcome, join_all
from megaforge.data.corpus.stages.decontaminate import DecontaminateSettings
from megaforge.data.corpus.stages.paragraphs import ParagraphsSettings
from megaforge.errors import UserError

PASSAGE = (
    "This passage of text is long enough to be compared, and stands in more than one of the documents of the test."
)
FOOTER = "Copyright by Example Inc."
WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon".split()
)


def joined(texts: list[str], parts: int, settings: ParagraphsSettings, **columns: str) -> list[Outcome]:
    size = -(-len(texts) // parts)
    tables = [
        make_records(texts[begin : begin + size], id=range(begin, min(begin + size, len(texts))), **columns)
        for begin in range(0, len(texts), size)
    ]
    outcomes = join_all(settings.open(Scope(Path("."))), tables)
    for table, outcome in zip(tables, outcomes, strict=True):
        check_outcome(outcome, table.num_rows, "paragraphs")
    return outcomes


@pytest.mark.parametrize("parts", [1, 4])
def test_paragraphs_stay_once_and_templates_not_at_all(parts: int) -> None:
    own = [f"Document {row} says something of its own, and this is all that it says in line one." for row in range(12)]
    texts = [f"{line}\n\n{FOOTER}" for line in own]
    texts[3] = f"{PASSAGE}\n{texts[3]}\n{PASSAGE}"
    texts[7] = f"{texts[7]}\n{PASSAGE}\nthe end"
    texts.append(PASSAGE)
    texts.append("")
    outcomes = joined(texts, parts, ParagraphsSettings())
    got = [text for outcome in outcomes for text in outcome.records["text"].to_pylist()]
    reasons = [reason for outcome in outcomes for reason in outcome.reasons or ()]
    expected = [f"{line}\n" for line in own]
    expected[3] = f"{PASSAGE}\n{own[3]}\n\n{PASSAGE}"
    expected[7] = f"{own[7]}\n\nthe end"
    assert got == [*expected, "", ""]
    assert [row for row, reason in enumerate(reasons) if reason] == [12]
    assert reasons[12] == "little is left of it (removed 1 repeated paragraphs and 0 of templates)"
    rewrites = [one for outcome in outcomes for one in outcome.rewrites or ()]
    assert rewrites[7] == "removed 1 repeated paragraphs and 1 of templates"
    assert sum(outcome.counts.get("paragraphs of templates", 0) for outcome in outcomes) == 12


def test_paragraphs_of_code_stay() -> None:
    texts = [f"{PASSAGE}\n{row}" for row in range(12)]
    outcome = joined(texts, 1, ParagraphsSettings(), kind=CODE)[0]
    assert outcome.records["text"].to_pylist() == texts and set(outcome.reasons or ()) == {None}


def test_text_of_evaluation_files_is_found(tmp_path: Path) -> None:
    question, answer, short = " ".join(WORDS), " ".join(reversed(WORDS)), "one two three four five six seven eight nine"
    record = {"question": question, "choices": [answer, "no"], "id": 7, "meta": {"note": short}}
    with gzip.open(tmp_path / "eval.jsonl.gz", "wt") as file:
        file.write(json.dumps(record) + "\n\n")
    (tmp_path / "held.txt").write_text(
        "Nothing of this line is anywhere else, it is only here for the test.\ntoo short\n"
    )
    settings = DecontaminateSettings(files=("*.jsonl.gz", "held.txt"))
    stage = settings.open(Scope(tmp_path))
    texts = [
        "A page. " + ", ".join(WORDS[2:15]).upper() + "! And more.",
        "A page. " + ", ".join(WORDS[2:14]) + " and more",
        f"it has\n“{answer}”",
        f"{short.replace(' ', '  ')} ten",
        short.replace("five", "5"),
        "nothing of THIS line - is anywhere else; it is only here for the test",
        "too short",
        "",
    ]
    outcome = stage.apply(make_records(texts))
    check_outcome(outcome, len(texts), "decontaminate")
    assert [row for row, reason in enumerate(outcome.reasons or ()) if reason] == [0, 2, 3, 5]
    assert (outcome.reasons or ())[0] == "text of an evaluation file (eval.jsonl.gz, 1 runs of words)"
    assert outcome.counts == {"documents with text of eval.jsonl.gz": 3, "documents with text of held.txt": 1}
    lenient = DecontaminateSettings(files=settings.files, most=1).open(Scope(tmp_path)).apply(make_records(texts))
    assert [row for row, reason in enumerate(lenient.reasons or ()) if reason] == [2, 5]


def test_evaluation_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only this\n")
    (tmp_path / "broken.jsonl").write_text('{"a": "b"}\n{"a": \n')
    with pytest.raises(UserError, match="needs the files"):
        DecontaminateSettings().validate()
    for name, words in (
        ("missing.txt", "no such file"),
        ("short.txt", "no line or string has 8 words"),
        ("broken.jsonl", "line 2"),
    ):
        with pytest.raises(UserError, match=words):
            DecontaminateSettings(files=(name,)).open(Scope(tmp_path))
