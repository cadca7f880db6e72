"""Batch sizes against Megatron-LM's own rule, walked batch by batch."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.cli import parse_config
from megaforge.errors import UserError

RAMPS = [(32, (8, 8, 96)), (32, (8, 8, 97)), (30, (6, 12, 5)), (16, (2, 2, 1000)), (9, (8, 1, 1)), (64, (1, 1, 64))]


def of_megatron(schedule: BatchSchedule, consumed: int) -> int:
    """``RampupBatchsizeNumMicroBatchesCalculator.update`` of Megatron-LM, in exact numbers."""
    start, increment, samples = schedule.rampup
    if consumed > samples:
        return schedule.size
    each = Fraction(samples, (schedule.size - start) // increment)
    return start + int(consumed / each) * increment


def walk(schedule: BatchSchedule, consumed: int, steps: int) -> list[tuple[int, int]]:
    """(first sample, size) of the next batches, one by one."""
    found = []
    for _ in range(steps):
        found.append((consumed, of_megatron(schedule, consumed + schedule.before)))
        consumed += found[-1][1]
    return found


@pytest.mark.parametrize(("size", "rampup"), RAMPS)
@pytest.mark.parametrize("before", [0, 5])
def test_the_rule_is_megatrons(size: int, rampup: tuple[int, int, int], before: int) -> None:
    schedule = BatchSchedule(size, rampup, before)
    for sample in range(rampup[2] + 3):
        assert schedule.size_at(sample) == of_megatron(schedule, sample + before)
    assert {of_megatron(schedule, n) for n in range(rampup[2] + 2)} <= {*schedule.sizes}
    for start in (0, 1, 7, rampup[2] - 1, rampup[2] + 4):
        found: list[tuple[int, int]] = []
        for first, each, count in schedule.stretches(start):
            found += [(first + i * each, each) for i in range(40 if count is None else count)]
        assert found[:80] == walk(schedule, start, len(found))[:80]
    for steps in (0, 1, 2, 5, 60):
        assert schedule.samples_after(steps) == sum(each for _, each in walk(schedule, 0, steps))


def test_without_a_ramp_there_is_one_size() -> None:
    schedule = BatchSchedule(8)
    assert [*schedule.sizes] == [8] == [schedule.size_at(9)] and schedule.samples_after(3) == 24
    assert [*BatchSchedule(8, (2, 2, 100)).sizes] == [2, 4, 6, 8]
    assert list(schedule.stretches(5)) == [(5, 8, None)]
    assert str(schedule) == "8" and str(BatchSchedule(8, (2, 2, 100))) == "2 to 8"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["8", "8"], "--rampup-batch-size 8 8: give three numbers, START INCREMENT SAMPLES"),
        (["8", "8", "0"], "--rampup-batch-size 8 8 0: must be at least 1"),
        (["8", "7", "100"], "steps of 7 from 8 on do not lead to --global-batch-size 32"),
        (["32", "8", "100"], "from 32 on do not lead to --global-batch-size 32; use a START below it"),
        (["40", "8", "100"], "from 40 on do not lead to --global-batch-size 32"),
    ],
)
def test_impossible_ramps_are_refused(flags: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_config(["--global-batch-size", "32", "--rampup-batch-size", *flags])
    with pytest.raises(UserError, match="--rampup-batch-size 8 8 100: --global-batch-size is missing"):
        parse_config(["--rampup-batch-size", "8", "8", "100"])
