"""What a run's time went into, on events that were made up."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megaforge.monitor.accounting import Accounting


def event(kind: str, uptime: float, iteration: int, *, began: float = 1000.0, pid: int = 1, **fields: Any) -> Any:
    """An event of the process ``pid`` that was started at ``began``."""
    own = {"host": "a", "pid": pid} if kind == "start" else {}
    return {"time": began + uptime, "kind": kind, "iteration": iteration, "uptime": uptime, **own, **fields}


FIRST = [
    event("start", 10, 0),
    event("load", 14, 0, seconds=3.0),
    event("train", 20, 0),
    event("save", 125, 10, seconds=5.0),  # 100 s for ten steps
    event("evaluate", 240, 20, seconds=15.0),
    event("progress", 290, 25),  # killed behind it, at the latest a minute later
]
SECOND = [
    event("start", 8, 0, began=1350.0, pid=2),
    event("load", 12, 10, began=1350.0, seconds=4.0),
    event("train", 18, 10, began=1350.0),
    event("end", 118, 20, began=1350.0),
]


def test_every_second_counts_once() -> None:
    found = Accounting(FIRST).goodput()
    assert found.spent == {"start-up": 17.0, "load": 3.0, "save": 5.0, "evaluation": 15.0, "steps": 250.0}
    assert found.total == 290 and found.steps == 25 and found.attempts == 1


def test_steps_that_are_made_again_count_once() -> None:
    found = Accounting(FIRST + SECOND).goodput()
    assert found.spent == {
        "start-up": 17.0 + 14.0,
        "load": 7.0,
        "save": 5.0,
        "evaluation": 15.0,
        "re-done": 100.0 + 50.0,  # iterations 11 to 25 of the first process
        "steps": 100.0 + 100.0,
        "restart": 60.0,  # from 1290 to 1350
    }
    assert found.total == 118 + 350 and found.attempts == 2 and found.share == 200 / 468
    lines = found.lines()
    assert lines[0].startswith("goodput 42.7%: of 7.8 min in 2 attempts, 3.3 min")
    assert "re-done 32.1% (2.5 min)" in lines[1]


def test_part_of_a_stretch_is_made_again() -> None:
    later = [event("start", 0, 0, began=1300, pid=2), event("train", 0, 15, began=1300)]
    assert Accounting(FIRST + later).goodput().spent["re-done"] == 50.0 + 50.0


def test_going_back_within_a_process() -> None:
    told = [*FIRST[:3], event("progress", 120, 10), event("rollback", 150, 6, seconds=10.0), event("end", 190, 10)]
    spent = Accounting(told).goodput().spent
    assert spent == {"start-up": 17.0, "load": 3.0, "re-done": 40.0 + 20.0, "rollback": 10.0, "steps": 60.0 + 40.0}


def test_seconds_within_which_others_spoke() -> None:
    """A checkpoint that the background finished while the run evaluated."""
    told = [*FIRST[:3], event("progress", 120, 10), event("replica", 124, 10), event("evaluate", 130, 10, seconds=10.0)]
    assert Accounting(told).goodput().spent == {"start-up": 17.0, "load": 3.0, "steps": 100.0, "evaluation": 10.0}


def test_what_goes_on_beside_steps_costs_its_stall() -> None:
    told = [*FIRST[:3], event("snapshot", 120, 10, stall=2.0, seconds=60.0)]
    assert Accounting(told).goodput().spent == {"start-up": 17.0, "load": 3.0, "snapshot": 2.0, "steps": 98.0}


def test_time_without_steps_and_clocks_that_jump() -> None:
    told = [*FIRST[:3], event("hang", 80, 0, began=-5000.0), event("start", 5, 0, pid=2, began=-9000.0)]
    spent = Accounting(told).goodput().spent
    assert spent == {"start-up": 17.0 + 5.0, "load": 3.0, "other": 60.0}


def test_one_process_that_starts_twice() -> None:
    told = [*FIRST[:3], event("end", 120, 10), event("start", 130, 0), event("train", 131, 10), event("end", 141, 11)]
    found = Accounting(told).goodput()
    assert found.attempts == 1 and found.total == 141
    assert found.spent == {"start-up": 17.0 + 11.0, "load": 3.0, "steps": 110.0}


def test_nothing_has_happened() -> None:
    found = Accounting().goodput()
    assert found.total == 0 and found.share == 0 and found.lines()[0].startswith("goodput 0.0%")


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_to_one_whatever_happens(seed: int) -> None:
    """Any processes, loads, saves, retreats: the whole is the time of the processes and of the gaps between them."""
    draw = random.Random(seed)
    accounting, whole, clock = Accounting(), 0.0, 1000.0
    for pid in range(draw.randint(1, 5)):
        gap = draw.uniform(0, 90) if pid else 0.0
        began, uptime, iteration = clock + gap, 0.0, draw.randint(0, 30)
        whole += gap
        for kind in ("start", "load", "train", *draw.choices(("save", "evaluate", "progress", "rollback"), k=9)):
            uptime += draw.uniform(0, 50)
            iteration = max(0, iteration - 7) if kind == "rollback" else iteration + draw.randint(0, 9)
            more = {"seconds": draw.uniform(0, 60)} if kind in ("load", "save", "evaluate") else {}
            accounting.add(event(kind, uptime, iteration, began=began, pid=pid, **more))
        whole += uptime
        clock = began + uptime
    found = accounting.goodput()
    assert found.total == pytest.approx(whole) and min(found.spent.values()) >= 0
    later = accounting.goodput(uptime + 10, iteration + 1)
    assert later.total == pytest.approx(whole + 10) and later.spent["steps"] == pytest.approx(
        found.spent.get("steps", 0) + 10
    )
