"""MinHash and SimHash on pairs of known likeness, and clusters against a plain union-find."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megaforge.data.corpus import clusters
from megaforge.data.corpus.clusters import components
from megaforge.data.corpus.records import make_records, row_id
from megaforge.data.corpus.runs import BINS, signatures
from megaforge.data.corpus.stage import Scope, join_all
from megaforge.data.corpus.stages.minhash import MinhashSettings, band_rows
from megaforge.data.corpus.stages.simhash import SimhashSettings, differing_bits, fingerprints
from megaforge.data.corpus.words import plain_words

SCOPE = Scope(Path("."))


def random_words(source: random.Random, count: int) -> list[str]:
    return [f"w{source.randrange(50_000)}" for _ in range(count)]


def jaccard(one: Sequence[str], other: Sequence[str], n: int) -> float:
    a, b = ({tuple(words[at : at + n]) for at in range(len(words) - n + 1)} for words in (one, other))
    return len(a & b) / len(a | b)


def near(words: Sequence[str], target: float, source: random.Random, n: int = 5) -> list[str]:
    """The words with some at the end replaced, so that the likeness is about the target."""
    runs = len(words) - n + 1
    shared = round(2 * runs * target / (1 + target))
    keep = min(shared + n - 1, len(words))
    return [*words[:keep], *random_words(source, len(words) - keep)]


def dropped(settings: Any, texts: list[str], parts: int = 1, **columns: Any) -> list[int]:
    """The rows that are dropped, whatever the partitions."""
    size = -(-len(texts) // parts)
    tables = [
        make_records(
            texts[begin : begin + size],
            id=range(begin, min(begin + size, len(texts))),
            **{name: values[begin : begin + size] for name, values in columns.items()},
        )
        for begin in range(0, len(texts), size)
    ]
    outcomes = join_all(settings.open(SCOPE), tables)
    reasons = [reason for outcome in outcomes for reason in outcome.reasons or ()]
    return [row for row, reason in enumerate(reasons) if reason is not None]


@pytest.mark.parametrize("length", [60, 400])
def test_near_duplicates_are_found_and_others_are_not(length: int) -> None:
    source = random.Random(length)
    texts, alike, unlike = [], [], []
    for number in range(260):
        one = random_words(source, length)
        target = 0.88 if number % 2 else 0.58
        other = near(one, target, source)
        found = jaccard(one, other, 5)
        (alike if found >= 0.85 else unlike if found <= 0.6 else []).append(len(texts) + 1)
        texts += [" ".join(one), " ".join(other)]
    assert min(len(alike), len(unlike)) > 100
    gone = set(dropped(MinhashSettings(), texts, parts=3)) | {
        row + 1 for row in dropped(MinhashSettings(), texts) if row % 2 == 0
    }
    assert sum(row in gone for row in alike) / len(alike) >= 0.95
    assert sum(row in gone for row in unlike) / len(unlike) < 0.01


def test_the_estimate_is_that_of_the_sets() -> None:
    source = random.Random(5)
    errors = []
    for target in (0.2, 0.5, 0.8, 0.9) * 25:
        one = random_words(source, source.choice((40, 200, 1000)))
        other = near(one, target, source)
        words = plain_words(pa.array([" ".join(one), " ".join(other)], pa.large_string()))
        a, b = signatures(words, 5)
        errors.append((a == b).mean() - jaccard(one, other, 5))
    assert abs(np.mean(errors)) < 0.015 and np.sqrt(np.mean(np.square(errors))) < 0.055


def test_small_and_equal_texts_and_more_rows_than_one_sort_takes() -> None:
    texts = [
        "",
        "...",
        "one",
        "One!",
        "one two three",
        "one  two, three",
        "one two",
        "a b c d e",
        "A B C D E",
        "一二三",
        "一二三",
    ]
    assert dropped(MinhashSettings(), texts) == [3, 5, 8, 10]
    many = [f"text number {row} of so many" for row in range(2100)] + ["text number 7 of so many"]
    assert dropped(MinhashSettings(), many) == [2100]
    words = plain_words(pa.array(many, pa.large_string()))
    alone = plain_words(pa.array(many[2080:2081], pa.large_string()))
    assert (signatures(words, 3)[2080] == signatures(alone, 3)[0]).all()
    assert signatures(alone, 5).shape == (1, BINS)


@pytest.mark.parametrize("settings", [MinhashSettings(), SimhashSettings()])
def test_the_best_of_a_cluster_stays_whatever_the_partitions(settings: Any) -> None:
    source = random.Random(9)
    base = [random_words(source, 2000) for _ in range(6)]
    texts, quality = [], []
    for words in base:
        for copy in range(4):
            texts.append(" ".join([*words, f"end{copy}"] + ["more"] * (copy == 2)))
            quality.append(0.5)
    quality[5] = 0.9  # the second of the second cluster
    expected = sorted(set(range(24)) - {2, 5, 10, 14, 18, 22})  # of equals the longest, which has one word more
    for parts in (1, 2, 5):
        assert dropped(settings, texts, parts, quality=quality) == expected
    outcome = join_all(
        settings.open(SCOPE), [make_records(texts, quality=quality, id=[row_id(3, row) for row in range(24)])]
    )[0]
    assert (outcome.reasons or ())[4] == "near-duplicate (of 3-5)"
    assert outcome.counts == {"clusters of 4 to 7 documents": 6}


def test_chains_are_one_cluster_and_unlike_documents_of_one_band_are_told_apart() -> None:
    one = np.array([5, 1, 2, 8])
    other = np.array([1, 2, 9, 7])
    assert components(one, other, 11).tolist() == [0, 1, 1, 3, 4, 1, 6, 7, 7, 1, 10]
    source = np.random.default_rng(4)
    for _ in range(30):
        nodes = int(source.integers(1, 60))
        pairs = source.integers(0, nodes, (int(source.integers(0, 60)), 2))
        root = list(range(nodes))
        for _ in range(nodes):  # plain: the smallest label spreads
            for a, b in pairs.tolist():
                root[a] = root[b] = min(root[a], root[b])
        assert components(pairs[:, 0], pairs[:, 1], nodes).tolist() == root


def test_bands_of_thresholds() -> None:
    rows = [band_rows(threshold) for threshold in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    assert rows == sorted(rows) and rows[4] == 8
    for threshold in (0.3, 0.5, 0.8, 0.9):
        rows_of_band = band_rows(threshold)
        assert 1 - (1 - (threshold + 0.05) ** rows_of_band) ** (BINS // rows_of_band) >= 0.99


def test_fingerprints() -> None:
    source = random.Random(2)
    words = random_words(source, 200)
    changed = [*words[:100], "other", *words[101:]]
    texts = [" ".join(words), " ".join(changed), " ".join(random_words(source, 200)), ""]
    prints = fingerprints(plain_words(pa.array(texts, pa.large_string())), 2)
    bits = differing_bits(prints[[0, 0]], prints[[1, 2]])
    assert bits[0] <= 6 and 15 < bits[1] < 50 and prints[3] == 0
    assert differing_bits(
        np.array([0, 2**64 - 1, 5], np.uint64), np.array([2**64 - 1, 2**64 - 1, 4], np.uint64)
    ).tolist() == [64, 0, 1]
    plain = [
        sum(
            1 if int(gram) >> bit & 1 else -1
            for gram in plain_words(pa.array(texts[:1], pa.large_string())).ngrams(2)[1]
        )
        for bit in range(64)
    ]
    assert int(prints[0]) == sum(1 << bit for bit, total in enumerate(plain) if total > 0)
    assert dropped(SimhashSettings(distance=6), texts) == [1]
    assert dropped(SimhashSettings(distance=0), [*texts, texts[0]]) == [4]


def test_a_large_group_takes_bounded_work_and_what_it_leaves_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of one key that are all unlike but for some pairs: found where few stand before them."""
    monkeypatch.setattr(clusters, "MOST_COMPARISONS", 8)
    rows = 400
    value = np.arange(rows)
    value[3], value[390], value[398] = 2, 5, 397  # the last pair is behind more unlike rows than are compared
    sketches = pa.table(
        {
            "key": np.full(rows, 7, np.uint64),
            "id": np.arange(rows),
            "quality": np.zeros(rows, np.float32),
            "length": np.ones(rows, np.int64),
        }
    )
    compared = 0

    def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(one)
        return np.asarray(value[one] == value[other])

    pairs = clusters.pairs_alike(sketches, alike)
    found = set(zip(pairs["id"].to_pylist(), pairs["other"].to_pylist(), strict=True))
    assert {pair for pair in found if pair[0] != pair[1]} == {(2, 3), (5, 390)} and compared <= 8 * rows
    aside = {one for one, other in found if one == other}
    assert aside == set(range(9, rows)) - {390}
    decisions = clusters.keep_best([pairs], "near-duplicate")
    assert {row["id"] for row in decisions.to_pylist() if row["reason"]} == {3, 390}
    counts = clusters.cluster_counts(decisions)
    assert counts["documents unlike 8 of a larger group, not compared with the rest"] == len(aside)
    assert counts["clusters of 2 to 3 documents"] == 2
    few = sketches.slice(0, 9)
    assert {tuple(row.values())[:2] for row in clusters.pairs_alike(few, alike).to_pylist()} == {(2, 3)}
