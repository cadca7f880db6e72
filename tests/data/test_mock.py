"""Random samples without a file: a pure function of seed and number, spread over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.data.loader import GlobalBatchLoader
from megaforge.data.mock import MockData
from megaforge.data.sample_schedule import SampleSchedule, ScheduleChange
from megaforge.errors import UserError


def sample(data: MockData, k: int) -> tuple[list[int], list[bool]]:
    length = data.sequence_length(k) + 1
    tokens, marks = np.empty(length, np.int64), np.zeros(length, np.bool_)
    assert data.fill(k, tokens, marks) == length - 1
    return tokens.tolist(), marks.tolist()


def test_samples_depend_on_seed_and_number_alone() -> None:
    one = MockData(SampleSchedule(1, 64), 1000)
    again = MockData(SampleSchedule(1, 64, lanes=9, changes=(ScheduleChange(9, 32),)), 1000)
    assert [sample(one, k) for k in range(9)] == [sample(again, k) for k in range(9)]
    others = (MockData(SampleSchedule(2, 64), 1000), one.validation(), MockData(SampleSchedule(1, 64), 900))
    assert all(sample(one, 3) != sample(other, 3) for other in others)
    assert sample(one, 3) != sample(one, 4) and sample(one.validation(), 3) == sample(again.validation(), 3)


def test_every_id_is_as_likely_and_documents_begin_at_random() -> None:
    data = MockData(SampleSchedule(1, 4096), 10)
    drawn = [sample(data, k) for k in range(20)]
    counts = np.bincount(np.concatenate([tokens for tokens, _ in drawn]), minlength=10)
    assert len(counts) == 10 and counts == pytest.approx(np.full(10, 8194), rel=0.06)
    assert all(marks[0] for _, marks in drawn)
    assert sum(sum(marks) - 1 for _, marks in drawn) == pytest.approx(160, rel=0.3)
    assert set(sample(MockData(SampleSchedule(1, 64), 1), 0)[0]) == {0}, "a vocabulary of one"


def test_any_layout_reads_the_same_and_a_state_goes_on() -> None:
    data = MockData(SampleSchedule(1, 8), 50)
    whole = next(iter(GlobalBatchLoader(data, BatchSchedule(4), 4)))[0].tokens
    parts = [next(iter(GlobalBatchLoader(data, BatchSchedule(4), 1, rank, 2))) for rank in range(2)]
    rows = [batch.tokens[0].tolist() for pair in zip(*parts, strict=True) for batch in pair]
    assert rows == whole.tolist()
    data.check_state(data.state(40))
    for other, name in (
        (MockData(SampleSchedule(1, 8), 51), "--data-path"),
        (MockData(SampleSchedule(2, 8), 50), "--seed"),
    ):
        with pytest.raises(UserError, match=name):
            other.check_state(data.state(40))
