"""Samples that a run leaves out: the others keep their order, and every count is of what is left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaforge.data.data_source import DataSource
from megaforge.data.skip_list import SKIP_FILE, add_skip, read_skips, set_skips_aside
from megaforge.data.skipped import SkippedSamples


class Numbers(DataSource):
    """Sample k is k, in two tokens, and from sample 12 on in four."""

    @property
    def stage_starts(self) -> list[int]:
        return [0, 12]

    def sequence_length(self, k: int) -> int:
        return 2 if k < 12 else 4

    def fill(self, k: int, tokens: Any, marks: Any) -> int:
        tokens[:] = k
        return len(tokens) - 1

    def tokens_before(self, samples: int) -> int:
        return sum(map(self.sequence_length, range(samples)))

    def state(self, consumed_samples: int) -> dict[str, Any]:
        return {"entered": 1 + (consumed_samples > 12)}


def read(data: SkippedSamples, k: int) -> int:
    tokens = np.empty(3, np.int64)
    data.fill(k, tokens, np.zeros(3, np.bool_))
    return int(tokens[0])


@pytest.mark.parametrize("stretches", [[], [(4, 8)], [(0, 2), (10, 14)], [(6, 8), (4, 6), (7, 9)], [(3, 3)]])
def test_against_a_list(stretches: list[tuple[int, int]]) -> None:
    source, data = Numbers(), SkippedSamples(Numbers())
    data.leave_out(stretches)
    left = [k for k in range(40) if not any(a <= k < b for a, b in stretches)]
    assert [read(data, k) for k in range(len(left))] == left
    assert [data.sequence_length(k) for k in range(len(left))] == [source.sequence_length(k) for k in left]
    for samples in range(len(left)):
        assert data.tokens_before(samples) == sum(map(source.sequence_length, left[:samples]))
        assert data.read_before(samples) == (left[samples - 1] + 1 if samples else 0)
    assert [data.left_before(number) for number in range(40)] == [sum(k < number for k in left) for number in range(40)]
    assert data.stage_starts == [0, sum(k < 12 for k in left)]


def test_a_checkpoint_keeps_them() -> None:
    data, other = SkippedSamples(Numbers()), SkippedSamples(Numbers())
    assert data.state(13) == {"entered": 2}
    data.leave_out([(4, 8)])
    saved = data.state(9)
    assert saved == {"entered": 2, "skipped": [[4, 8]]} and data.state(8)["entered"] == 1
    other.leave_out([(20, 30)])
    other.check_state(saved | {"consumed_samples": 9})
    assert other.stretches == ((4, 8),)


def test_another_runs_list_is_kept_under_another_name(tmp_path: Path) -> None:
    for number, name in enumerate(("abandoned", "abandoned.1")):
        add_skip(tmp_path, (4, 8 + number))
        assert read_skips(tmp_path) == [(4, 8 + number)]
        moved = set_skips_aside(tmp_path)
        assert moved is not None and moved.name == f"{SKIP_FILE}.{name}" and read_skips(tmp_path) == []
    assert len(os.listdir(tmp_path)) == 2 and set_skips_aside(tmp_path) is None
