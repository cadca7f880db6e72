"""--data-path, --split and the weighted mix, against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaforge.data import blend as blend_module
from megaforge.data.blend import Blend, parse_data_path, parse_split, split_ranges
from megaforge.errors import UserError


def test_data_path_forms() -> None:
    assert parse_data_path(["corpus/a"]) == [(1.0, "corpus/a")]
    assert parse_data_path(["corpus/a.bin"]) == [(1.0, "corpus/a")]
    assert parse_data_path(["0.7", "a", "0.3", "b.idx"]) == [(0.7, "a"), (0.3, "b")]
    assert parse_data_path(["0.7 a 3 b"]) == [(0.7, "a"), (3.0, "b")]
    assert parse_data_path(["my data/a"]) == [(1.0, "my data/a")]
    assert parse_data_path(["a", "b.bin", "c"]) == [(None, "a"), (None, "b"), (None, "c")]
    assert parse_data_path(["0.7", "my data/a", "3", "2024"]) == [(0.7, "my data/a"), (3.0, "2024")]


def test_a_word_that_names_a_dataset_is_that_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces, numbers and suffixes in its name or not; where two readings are left, the message names a third."""
    monkeypatch.chdir(tmp_path)
    Path("1 my").mkdir()
    for name in ("1 my/data", "2024", "2025", "0.5 a", "c.bin"):
        Path(f"{name}.idx").touch()
    assert parse_data_path(["1 my/data.bin"]) == [(1.0, "1 my/data")]
    assert parse_data_path(["2024"]) == [(1.0, "2024")]
    assert parse_data_path(["0.5 a"]) == [(1.0, "0.5 a")], "the file, not a blend of one"
    assert parse_data_path(["0.5 b"]) == [(0.5, "b")]
    assert parse_data_path(["c.bin"]) == [(1.0, "c.bin")], "its index is c.bin.idx"
    assert parse_data_path(["3", "2024", "1", "2025"]) == [(3.0, "2024"), (1.0, "2025")]
    with pytest.raises(UserError, match="put its name in quotes: --data-path '1 my/data'"):
        parse_data_path(["1", "my/data"])
    with pytest.raises(UserError, match=r"2024 may be weights, and are datasets.*'1 \./2024 1 \./2025'"):
        parse_data_path(["2024", "2025"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one dataset prefix"),
        ([""], "give one dataset prefix"),
        (["0.5"], r"there is no 0.5\.idx; give one dataset prefix"),
        (["0.5", "a", "b"], "give one dataset prefix"),
        (["a", "0.5"], "weight of 0.5 is 'a'"),
        (["1", "a", "-2", "b"], "weight of b is '-2'"),
        (["0", "a"], "weight of a is '0'"),
        (["nan", "a"], "weight of a is 'nan'"),
        (["inf", "a"], "weight of a is 'inf'"),
    ],
)
def test_data_path_errors_name_the_flag(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"--data-path.*{message}"):
        parse_data_path(words)


def test_split_forms() -> None:
    assert parse_split("99,1,0") == (0.99, 0.01, 0.0)
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split("'99,1,0'") == parse_split('"99,1,0"') == parse_split("99,1,0"), "as Llama's scripts quote it"
    assert parse_split("0.5, 0.5") == (0.5, 0.5, 0.0)
    for bad in ("", "a", "1,2,3,4", "0,0", "-1,2", "nan,1"):
        with pytest.raises(UserError, match=f"--split '{bad}'"):
            parse_split(bad)


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), st.integers(0, 5000))
def test_split_ranges_adjoin_and_cover(shares: list[int], documents: int) -> None:
    ranges = split_ranges(parse_split(",".join(map(str, shares))), documents)
    assert ranges[0][0] == 0 and ranges[-1][1] == documents
    assert all(one[1] == two[0] and one[0] <= one[1] for one, two in zip(ranges, ranges[1:], strict=False))
    for share, (first, stop) in zip(shares, ranges, strict=True):
        assert abs(stop - first - documents * share / sum(shares)) <= 1 + 1e-6


def exact_mix(weights: list[int], samples: int) -> list[tuple[int, int]]:
    """(source, ordinal) of the first samples, by the definition: sort all due times."""
    due = [(Fraction(2 * i + 1, 2 * w), source, i) for source, w in enumerate(weights) if w for i in range(samples)]
    return [(source, i) for _, source, i in sorted(due)[:samples]]


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(0, 64), min_size=1, max_size=5).filter(any), block=st.integers(1, 50))
def test_mix_is_the_definition_from_any_entry(weights: list[int], block: int) -> None:
    # Weights whose sum is a power of two are exact in floating point, so even ties must agree.
    total = 1 << (sum(weights) - 1).bit_length()
    weights = [*weights, total - sum(weights)]
    expected = exact_mix(weights, 120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_module, "_BLOCK", block)
        mix = Blend([float(w) for w in weights])
        assert [mix.locate(k) for k in range(119, -1, -1)] == expected[::-1]
        for samples in (0, 1, 7, 50, 119):
            taken = [source for source, _ in expected[:samples]]
            assert mix.counts(samples) == [taken.count(source) for source in range(len(weights))]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(1e-4, 1e3), min_size=2, max_size=6),
    start=st.integers(0, 10**12),
)
def test_mix_holds_its_shares_far_out(weights: list[float], start: int) -> None:
    mix = Blend(weights)
    counts = mix.counts(start)
    assert sum(counts) == start
    for count, weight in zip(counts, mix.weights, strict=True):
        assert abs(count - weight * start) <= 1 + weight * len(weights)
    for sample in range(start, start + 20):
        source, ordinal = mix.locate(sample)
        assert ordinal == counts[source]
        counts[source] += 1
    assert mix.counts(start + 20) == counts
