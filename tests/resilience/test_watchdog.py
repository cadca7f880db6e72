from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from megaforge.parallel.context import ParallelContext
from megaforge.resilience.last_words import LastWords
from megaforge.resilience.watchdog import HANG_STATUS, Watchdog
from tests.parallel.pool import RankPool


class Left(threading.Event):
    """Takes the place of leaving the process."""

    status = 0

    def __call__(self, status: int) -> None:
        self.status = status
        self.set()


def test_progress_holds_it_off_and_its_end_does_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    left, told = Left(), list[tuple[dict[int, LastWords], list[str]]]()
    dog = Watchdog(ParallelContext.single(), 0.6, folder=tmp_path, leave=left)
    dog.on_hang = lambda words, meant: told.append((words, meant))
    for step in range(6):
        dog.tell(f"step {step}")
        assert not left.wait(0.2)
    assert left.wait(10) and left.status == HANG_STATUS
    dog.close()
    ((words, meant),) = told
    assert words[0].phase == "step 5" and meant == ["it waits in 'step 5'"]
    assert any("test_watchdog.py" in frame or "threading.py" in frame for frame in words[0].stack), words[0].stack
    assert "test_progress_holds_it_off" in (tmp_path / "stacks_0.txt").read_text()
    assert "error: the run hangs: it waits in 'step 5'" in capfd.readouterr().err


def test_a_closed_one_does_not_bark() -> None:
    left = Left()
    Watchdog(ParallelContext.single(), 0.2, leave=left).close()
    assert not left.wait(0.5)


def test_reading_a_file_is_progress(tmp_path: Path) -> None:
    left, file = Left(), tmp_path / "large"
    file.write_bytes(bytes(2 << 20))
    dog = Watchdog(ParallelContext.single(), 0.5, leave=left)
    for _ in range(8):
        time.sleep(0.1)
        file.read_bytes()
    assert not left.is_set()
    dog.close()


def hang(folder: str, silent: bool) -> tuple[int, list[str], list[str]]:
    """Rank 0 waits in a collective to which rank 1 comes late; ``silent``: rank 1 says nothing either."""
    ctx = ParallelContext.create()
    left, told = Left(), list[tuple[dict[int, LastWords], list[str]]]()
    store = PrefixStore(f"dog{silent}", _get_default_store().clone())  # type: ignore[attr-defined]
    dog = Watchdog(ctx, 0.8, store, Path(folder), left)
    dog.on_hang = lambda words, meant: told.append((words, meant))
    dog.tell("step 1")
    dist.all_reduce(torch.ones(3), group=ctx.dp.group)
    if ctx.world.rank:
        if silent:
            dog.close()
            time.sleep(4.0)
        else:
            assert left.wait(20)
    dist.all_reduce(torch.ones(5), group=ctx.dp.group)
    if not (silent and ctx.world.rank):
        assert left.wait(20)
    dog.close()
    words, meant = told[0] if told else ({}, [])
    return left.status, meant, [one.line() for one in words.values()]


@pytest.mark.parametrize("silent", [False, True], ids=["late", "silent"])
def test_ranks_tell_who_is_missing(ranks: RankPool, tmp_path: Path, silent: bool) -> None:
    (status, meant, lines), (other, none, _) = ranks.run(2, hang, str(tmp_path), silent)
    assert status == HANG_STATUS and other == (0 if silent else HANG_STATUS) and not none
    if silent:
        assert meant[0].startswith("rank 1 gives no sign of life") and len(lines) == 1
    else:
        assert meant[0].startswith("rank 1 did not come to all_reduce [5], number "), meant
        assert len(lines) == 2 and (tmp_path / "stacks_1.txt").stat().st_size
    assert "all_reduce [5]" in lines[0] and "not done" in lines[0]
    entries = json.loads((tmp_path / "recorder_0.json").read_text())["entries"]
    assert entries[-1]["input_sizes"] == [[5]] and not entries[-1]["retired"]


def goes_on() -> bool:
    """First ranks that tell nothing but communicate, then one that waits for another, which gets on."""
    ctx = ParallelContext.create()
    left = Left()
    store = PrefixStore("goes_on", _get_default_store().clone())  # type: ignore[attr-defined]
    dog = Watchdog(ctx, 0.8, store, None, left)
    for _ in range(12):
        dist.all_reduce(torch.ones(3), group=ctx.dp.group)
        time.sleep(0.1)
    for step in range(24 * ctx.world.rank):
        dog.tell(f"step {step}")
        time.sleep(0.1)
    dist.all_reduce(torch.ones(3), group=ctx.dp.group)
    dog.close()
    return left.is_set()


def test_one_that_gets_on_holds_it_off_for_all(ranks: RankPool) -> None:
    assert ranks.run(2, goes_on) == [False, False]
