"""Batch sizes against Megatron-LM's own rule, walked batch by batch."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megaforge.config.batch_schedule import BatchSchedule, in_samples, parse_steps
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


STEPS = ("0:16", "2.4B:320", "4.8B:624", "7.2B:928", "9.6B:1232", "12B:1536")


def test_steps_are_megatrons() -> None:
    """``StepBatchsizeNumMicroBatchesCalculator`` of Megatron-LM: thresholds in tokens, rounded down to samples."""
    for form in (STEPS, (" ".join(STEPS),), (f"'{' '.join(STEPS)}'",), (",".join(STEPS).lower(),)):
        assert parse_steps(form) == parse_steps(STEPS)
    steps = in_samples(parse_steps(STEPS), 2048)
    assert steps[:2] == ((0, 16), (1171875, 320)) and steps[-1] == (5859375, 1536)
    assert in_samples(parse_steps(["0:1.6K", "999:8", "1.5K:4"]), 1000) == ((0, 8), (1, 4)), "too close to tell apart"
    for before in (0, 7):
        schedule, consumed = BatchSchedule(6, steps=((0, 4), (10, 2), (21, 6)), before=before), 0
        walked = []
        for _ in range(20):
            at = consumed + before
            walked.append((consumed, 4 if at < 10 else 2 if at < 21 else 6))
            consumed += walked[-1][1]
        found = [(a + i * n, n) for a, n, many in schedule.stretches(0) for i in range(20 if many is None else many)]
        assert found[:20] == walked and [schedule.size_at(first) for first, _ in walked] == [n for _, n in walked]
        assert [schedule.samples_after(k) for k in range(20)] == [first for first, _ in walked]
    assert (str(schedule), schedule.sizes, schedule.changes, BatchSchedule(6).changes) == (
        "4 to 6",
        [2, 4, 6],
        True,
        False,
    )


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["1:8"], "--step-batch-size-schedule 1:8: it does not say the first size; begin with 0:SIZE"),
        (["0:8", "2X:16"], "2X:16 is not TOKENS:SIZE, such as 2.4B:320"),
        (["0:8", "16"], "16 is not TOKENS:SIZE"),
        (["0:8", "1M:16", "1000K:32"], "1000000:32 does not come behind 1000000 tokens"),
        (["0:0"], "a size must be at least 1"),
        (["0:8", "1M:16", "--global-batch-size", "8"], "its last size is 16, and --global-batch-size is 8"),
        (["0:8", "1M:16", "--rampup-batch-size", "4", "4", "9", "--global-batch-size", "16"], "exclude each other"),
    ],
)
def test_impossible_steps_are_refused(flags: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_config(["--step-batch-size-schedule", *flags])
    parse_config(["--step-batch-size-schedule", "0:8", "1M:16", "--global-batch-size", "16"])
