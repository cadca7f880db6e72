"""Which documents are held out: as many as Megatron's ranges hold, drawn from everywhere, and always the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaforge.data.blend import parse_split, split_ranges
from megaforge.data.samples import SampleSchedule, TrainingData
from megaforge.data.split import PARTS, split_documents
from megaforge.errors import UserError
from tests.data.datasets import write_dataset, write_sidecar


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), st.integers(0, 70), st.booleans())
def test_the_parts_share_out_all_documents(shares: list[int], documents: int, shuffled: bool) -> None:
    parsed = parse_split(",".join(map(str, shares)))
    parts = split_documents(parsed, "shuffled" if shuffled else "sequential", "digest", documents)
    held = [np.arange(documents)[parts[part]].tolist() for part in PARTS]
    assert sorted(sum(held, [])) == list(range(documents))
    ranges = split_ranges(parsed, documents)
    assert [len(part) for part in held] == [stop - first for first, stop in ranges]
    assert held[0] == sorted(held[0])
    if not shuffled:
        assert held == [list(range(first, stop)) for first, stop in ranges]


def test_the_draw_is_the_documented_one() -> None:
    """Documents by SplitMix64 of their number, keyed by the content; written out without our code."""
    key = int(hashlib.sha256(b'["split",1,"content"]').hexdigest()[:16], 16)

    def mixed(number: int) -> int:
        z = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    order = sorted(range(50), key=mixed)
    parts = split_documents((0.8, 0.14, 0.06), "shuffled", "content", 50)
    assert np.asarray(parts["train"]).tolist() == sorted(order[:40])
    assert [np.asarray(parts[part]).tolist() for part in PARTS[1:]] == [order[40:47], order[47:]]


def test_the_same_documents_are_held_out_whatever_the_run(tmp_path: Path) -> None:
    """Of a corpus in path order the held-out part is no tail, and no seed, length, lane, source or place changes it."""
    documents = [[i] * 3 for i in range(200)]
    prefix, moved = (write_dataset(tmp_path / name / "d", documents) for name in "ab")
    write_sidecar(moved)
    other = write_dataset(tmp_path / "o", [[500, 501, 502]] * 40)

    def held_out(*prefixes: str, seed: int = 1, length: int = 6, lanes: int = 1) -> list[int]:
        data = TrainingData([(1.0, one) for one in prefixes], "80,20", SampleSchedule(seed, length, lanes=lanes))
        view, tokens = data.validation(), list[int]()
        for k in range(len(view)):
            sample = view.sample(k)
            tokens += sample.tokens[: sample.targets].tolist()
        seen = {int(t) for k in range(800 // length) for t in data.sample(k).tokens}
        assert seen.isdisjoint(set(tokens) - {500, 501, 502})
        return [token for number, token in enumerate(tokens) if token < 500 and tokens[number - 1] != token]

    expected = held_out(prefix)
    assert len(expected) == 40 and min(expected) < 60 and sorted(expected) != expected
    assert np.mean(expected) == pytest.approx(100, abs=25)
    for found in (held_out(prefix, seed=2), held_out(moved, length=9), held_out(prefix, lanes=4)):
        assert found == expected
    assert set(held_out(prefix, other)) == set(held_out(other, moved)) == set(expected)


def test_a_run_keeps_its_split_order(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[i] * 3 for i in range(50)])

    def make(order: str, split: str) -> TrainingData:
        return TrainingData([(1.0, prefix)], split, SampleSchedule(1, 6), split_order=order)

    new, old = make("shuffled", "80,20"), make("sequential", "80,20").state(7)
    new.check_state(new.state(7))
    for saved in (old, {name: value for name, value in old.items() if name != "split_order"}):
        with pytest.raises(UserError, match="--split-order was sequential and is now shuffled"):
            new.check_state(saved)
        make("sequential", "80,20").check_state(saved)
    make("shuffled", "1").check_state(make("sequential", "1").state(7))
