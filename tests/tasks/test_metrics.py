"""Metrics against what they are defined as, and their intervals."""

from __future__ import annotations

import random
from importlib.metadata import EntryPoint
from unittest import mock

import pytest

from megaforge.errors import UserError
from megaforge.registry import TEXT_METRICS, Registry
from megaforge.tasks.intervals import interval, wilson
from megaforge.tasks.metrics import ExactMatch, Mean


@pytest.mark.parametrize(
    ("name", "text", "answers", "expected"),
    [
        ("exact_match", " 12  x\n", ("12 x",), 1),
        ("exact_match", "12 x", ("12", "x"), 1),
        ("exact_match", "12 xy", ("12 x",), 0),
        ("exact_match", "", ("a",), 0),
        ("contains", "it is 12345.", ("12345",), 1),
        ("contains", "123456", ("12345",), 0),
        ("contains", "a b", ("a", "b", "c", "d"), 0.5),
        ("contains", "C++ (x)", ("C++",), 1),
        ("contains", "", ("a",), 0),
        ("last_number", "3 + 4 = 7, so 1,007", ("The answer is 1007.0",), 1),
        ("last_number", "-5", ("5",), 0),
        ("last_number", "none", ("none",), 0),
        ("choice", "I think (B).", ("B",), 1),
        ("choice", "A", ("B",), 0),
        ("choice", "", ("B",), 0),
        ("boxed", r"so \boxed{\dfrac{1}{2}}", (r"\frac{1}{2}",), 1),
        ("boxed", "2", ("2",), 0),
        ("refusal", "I\u2019m sorry, no", (), 1),
        ("refusal", "Of course", (), 0),
    ],
)
def test_scores(name: str, text: str, answers: tuple[str, ...], expected: float) -> None:
    metric = TEXT_METRICS.get(name)
    assert metric.value(metric.sums(text, answers), 1) == expected


def test_bleu_of_a_corpus_is_sacrebleus_whatever_ranks_added_its_sums() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the eval extra")
    draw, words = random.Random(0), "a b c d e f g".split()
    texts = [" ".join(draw.choices(words, k=n)) for n in (0, 1, 3, 9, 20, 40)]
    references = [[f"{text} {' '.join(draw.choices(words, k=5))}", "a b c d e"] for text in texts]
    metric = TEXT_METRICS.get("bleu")
    sums = [metric.sums(text, own) for text, own in zip(texts, references, strict=True)]
    halves = [[sum(column) for column in zip(*part, strict=True)] for part in (sums[::2], sums[1::2])]
    found = metric.value([a + b for a, b in zip(*halves, strict=True)], len(texts))
    expected = sacrebleu.corpus_bleu(texts, [list(column) for column in zip(*references, strict=True)]).score
    assert found == pytest.approx(expected, abs=1e-12) and 0 < found < 100
    low, high = interval(metric, sums)
    assert low < found < high


def test_intervals_of_shares_are_wilsons() -> None:
    """Values of the formula's table: 8 of 10, none of 20, all of 5."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(5, 5) == pytest.approx((0.5655, 1.0), abs=1e-4)
    metric = ExactMatch()
    assert interval(metric, [(1.0,)] * 8 + [(0.0,)] * 2) == wilson(8, 10)


def test_other_intervals_hold_the_mean_about_as_often_as_they_say() -> None:
    metric, draw, inside = Mean(), random.Random(1), 0
    for _ in range(40):
        low, high = interval(metric, [(draw.random(),) for _ in range(40)])
        inside += low < 0.5 < high
    assert 33 <= inside <= 40
    assert interval(metric, [(0.25,)]) == (0.25, 0.25)


def test_an_installed_package_adds_metrics() -> None:
    metrics = Registry("metric", {}, entry_points="megaforge.metrics")
    point = EntryPoint("mine", "megaforge.tasks.metrics:EXACT_MATCH", "megaforge.metrics")
    with mock.patch("importlib.metadata.entry_points", return_value=[point]) as asked:
        assert metrics.get("mine").sums("a", ["a"]) == (1.0,)
    asked.assert_called_once_with(group="megaforge.metrics")
    with pytest.raises(UserError, match="'exact_mtach' is not a known metric .*did you mean exact_match"):
        TEXT_METRICS.check("exact_mtach")
