"""The watchdog, by a clock that the tests set: no time that passes on this machine makes it bark or holds it off."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from megaforge.parallel.context import ParallelContext
from megaforge.resilience import watchdog as module
from megaforge.resilience.last_words import LastWords, begun_collectives
from megaforge.resilience.watchdog import HANG_STATUS, HostClock, Watchdog
from tests.parallel.pool import RankPool

TIMEOUT, LOOK = 600.0, 15.0  # of the dogs' time: they look forty times before they bark
HANGS = 200.0  # of real time


class Left(threading.Event):
    """Takes the place of leaving the process."""

    status = 0

    def __call__(self, status: int) -> None:
        self.status = status
        self.set()


class Hand(HostClock):
    """A clock that stands until it is set on. ``threads``: how many wait for it, as long as none has barked."""

    def __init__(self, threads: int = 1) -> None:
        self._threads, self._seconds = threads, 0.0
        self._due: dict[int, float] = {}
        self._changed = threading.Condition()

    def now(self) -> float:
        return self._seconds

    def wait(self, event: threading.Event, seconds: float) -> bool:
        me = threading.get_ident()
        with self._changed:
            until = self._due[me] = self._seconds + seconds
            self._changed.notify_all()
            while not event.is_set() and self._seconds < until:
                self._changed.wait(0.02)
            self._due.pop(me, None)
        return event.is_set()

    def set_on(self, seconds: float) -> None:
        """So many seconds pass for those who wait; who was waiting until then has not looked yet."""
        with self._changed:
            self._seconds += seconds
            self._due = {thread: until for thread, until in self._due.items() if until > self._seconds}
            self._changed.notify_all()

    def looks(self, count: int) -> None:
        """So many looks, which all threads have done with when it returns."""
        for step in range(count + 1):
            with self._changed:
                assert self._changed.wait_for(lambda: len(self._due) >= self._threads, HANGS), "a thread is gone"
            if step < count:
                self.set_on(LOOK)


def until(condition: Callable[[], bool]) -> None:
    """Waits for ``condition``, which comes true unless something hangs."""
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def test_progress_holds_it_off_and_its_end_does_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "moved_bytes", lambda: 0)
    left, told, clock = Left(), list[tuple[dict[int, LastWords], list[str]]](), Hand()
    dog = Watchdog(ParallelContext.single(), TIMEOUT, folder=tmp_path, leave=left, clock=clock)
    dog.on_hang = lambda words, meant: told.append((words, meant))
    for step in range(6):
        dog.tell(f"step {step}")
        clock.looks(40)
        assert not left.is_set()
    clock.set_on(LOOK)  # the first look has found the step, forty have found nothing since
    assert left.wait(HANGS) and left.status == HANG_STATUS
    dog.close()
    ((words, meant),) = told
    assert words[0].phase == "step 5" and meant == ["it waits in 'step 5'"]
    assert any("test_watchdog.py" in frame or "threading.py" in frame for frame in words[0].stack), words[0].stack
    assert "test_progress_holds_it_off" in (tmp_path / "stacks_0.txt").read_text()
    said = capfd.readouterr().err
    assert "error: the run hangs: it waits in 'step 5'" in said and "no rank got on for 600 s" in said


def test_time_in_which_the_process_was_stopped_counts_as_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "moved_bytes", lambda: 0)
    left, clock = Left(), Hand()
    dog = Watchdog(ParallelContext.single(), TIMEOUT, leave=left, clock=clock)
    for _ in range(19):
        clock.looks(0)
        clock.set_on(100 * TIMEOUT)
    clock.looks(1)
    assert not left.is_set()
    clock.set_on(LOOK)
    assert left.wait(HANGS)
    dog.close()


def test_a_closed_one_does_not_bark() -> None:
    left, clock = Left(), Hand()
    dog = Watchdog(ParallelContext.single(), TIMEOUT, leave=left, clock=clock)
    dog.close()
    clock.set_on(2 * TIMEOUT)
    assert not any(thread.is_alive() for thread in dog._threads) and not left.is_set()


def test_reading_a_file_is_progress(tmp_path: Path) -> None:
    left, file, clock = Left(), tmp_path / "large", Hand()
    file.write_bytes(bytes(2 << 20))
    dog = Watchdog(ParallelContext.single(), TIMEOUT, leave=left, clock=clock)
    for _ in range(8):
        file.read_bytes()
        clock.looks(30)
    assert not left.is_set()
    dog.close()


def test_by_the_hosts_clock_it_barks_too() -> None:
    left = Left()
    dog = Watchdog(ParallelContext.single(), 0.1, leave=left)
    assert left.wait(HANGS)
    dog.close()


def hang(folder: Path, silent: bool) -> tuple[int, list[str], list[str]]:
    """Rank 0 waits in a collective to which rank 1 comes late; ``silent``: rank 1 says nothing either."""
    ctx = ParallelContext.create()
    left, told, clock = Left(), list[tuple[dict[int, LastWords], list[str]]](), Hand(2)
    store = PrefixStore(f"dog{silent}", _get_default_store().clone())  # type: ignore[attr-defined]
    dog = Watchdog(ctx, TIMEOUT, store, folder, left, clock)
    dog.on_hang = lambda words, meant: told.append((words, meant))
    dog.tell("step 1")
    dist.all_reduce(torch.ones(3), group=ctx.dp.group)
    rank, begun = ctx.world.rank, begun_collectives()

    def pass_time() -> None:
        """From when both stand. Where both bark it stops then, as neither may give up the other's words."""
        until(lambda: bool(rank) or begun_collectives() > begun)
        (folder / f"stands_{rank}").touch()
        until((folder / f"stands_{1 - rank}").exists)
        while not left.is_set():
            if silent or not (folder / f"stacks_{rank}.txt").exists():
                clock.set_on(LOOK)
            time.sleep(0.002)
        (folder / f"left_{rank}").touch()

    if rank and silent:
        dog.close()
        (folder / "stands_1").touch()
        until((folder / "left_0").exists)
    else:
        threading.Thread(target=pass_time, daemon=True).start()
        assert not rank or left.wait(HANGS)
    dist.all_reduce(torch.ones(5), group=ctx.dp.group)
    if not (silent and rank):
        assert left.wait(HANGS)
    dog.close()
    words, meant = told[0] if told else ({}, [])
    return left.status, meant, [one.line() for one in words.values()]


@pytest.mark.parametrize("silent", [False, True], ids=["late", "silent"])
def test_ranks_tell_who_is_missing(ranks: RankPool, tmp_path: Path, silent: bool) -> None:
    (status, meant, lines), (other, none, _) = ranks.run(2, hang, tmp_path, silent)
    assert status == HANG_STATUS and other == (0 if silent else HANG_STATUS) and not none
    if silent:
        assert meant[0].startswith("rank 1 gives no sign of life") and len(lines) == 1
    else:
        assert meant[0].startswith("rank 1 did not come to all_reduce [5], number "), meant
        assert len(lines) == 2 and (tmp_path / "stacks_1.txt").stat().st_size
    assert "all_reduce [5]" in lines[0] and "not done" in lines[0]
    entries = json.loads((tmp_path / "recorder_0.json").read_text())["entries"]
    assert entries[-1]["input_sizes"] == [[5]] and not entries[-1]["retired"]


def goes_on(folder: Path) -> bool:
    """First ranks that tell nothing but communicate, then one that waits for another, which gets on. The time of each
    passes between, half of what the dog bears."""
    ctx = ParallelContext.create()
    left, clock = Left(), Hand(2)
    store = PrefixStore("goes_on", _get_default_store().clone())  # type: ignore[attr-defined]
    dog = Watchdog(ctx, TIMEOUT, store, None, left, clock)
    for _ in range(4):
        dist.all_reduce(torch.ones(3), group=ctx.dp.group)
        clock.looks(20)

    def follow() -> None:
        for step in range(4):
            until((folder / f"step_{step}").exists)
            clock.looks(20)
            (folder / f"seen_{step}").touch()

    if ctx.world.rank:
        for step in range(4):
            dog.tell(f"step {step}")
            clock.looks(20)
            (folder / f"step_{step}").touch()
            until((folder / f"seen_{step}").exists)
    else:
        threading.Thread(target=follow, daemon=True).start()
    dist.all_reduce(torch.ones(3), group=ctx.dp.group)
    dog.close()
    return left.is_set()


def test_one_that_gets_on_holds_it_off_for_all(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, goes_on, tmp_path) == [False, False]
