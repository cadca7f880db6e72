"""The intervals between saves: the formula against simulated runs, its minimum, and what the command prints."""

from __future__ import annotations

import math
import random

import pytest

from megaforge.errors import UserError
from megaforge.planning.goodput import HOLDS, Tier, least_mtbf, lost, two_tiers
from megaforge.planning.goodput_command import run

HOUR = 3600.0


def simulated(
    durable: Tier, snapshot: Tier | None, mtbf: float, intervals: tuple[float, float], failures: int
) -> float:
    """Share of time lost by a run of so many failures: work goes on between saves, each failure at a random time throws
    away what no state that survives it holds."""
    draw = random.Random(1)
    work = clock = 0.0
    saved = {"durable": 0.0, "snapshot": 0.0}
    for _ in range(failures):
        left = draw.expovariate(1 / mtbf)
        clock += left
        while True:
            ends = {
                "durable": (math.floor(work / intervals[0] + 1e-9) + 1) * intervals[0],
                "snapshot": (math.floor(work / intervals[1] + 1e-9) + 1) * intervals[1],
            }
            if snapshot is None:
                del ends["snapshot"]
            name = min(ends, key=lambda one: ends[one])
            stall = durable.stall if name == "durable" or snapshot is None else snapshot.stall
            if left < ends[name] - work + stall:
                break
            left -= ends[name] - work + stall
            work = saved[name] = ends[name]
        survives = snapshot is not None and draw.random() < snapshot.share
        work = max(saved.values()) if survives else saved["durable"]
        saved["snapshot"] = min(saved["snapshot"], work) if not survives else saved["snapshot"]
        clock += snapshot.restart if survives and snapshot is not None else durable.restart
    return 1 - work / clock


@pytest.mark.parametrize(("stall", "restart"), [(1.0, 60.0), (30.0, 300.0), (2.0, 0.0)])
def test_as_simulated_with_durable_checkpoints(stall: float, restart: float) -> None:
    mtbf, tier = 30 * HOUR, Tier(stall, restart)
    for interval in (tier.interval(mtbf), 3 * tier.interval(mtbf)):
        found = simulated(tier, None, mtbf, (interval, math.inf), 4000)
        assert found == pytest.approx(tier.lost(mtbf, interval), rel=0.05)


def test_as_simulated_with_snapshots() -> None:
    mtbf = 30 * HOUR
    durable, snapshot = Tier(20.0, 300.0), Tier(0.5, 60.0, share=0.9)
    tiers = two_tiers(durable, snapshot)
    intervals = tiers[0].interval(mtbf), tiers[1].interval(mtbf)
    found = simulated(durable, snapshot, mtbf, intervals, 4000)
    assert found == pytest.approx(lost(tiers, mtbf), rel=0.1)
    assert found < simulated(durable, None, mtbf, (durable.interval(mtbf), math.inf), 4000)


def test_no_other_interval_loses_less() -> None:
    tier, mtbf = Tier(7.0, 100.0, share=0.3), 5 * HOUR
    best = tier.lost(mtbf)
    assert all(tier.lost(mtbf, tier.interval(mtbf) * factor) > best for factor in (0.5, 0.9, 1.1, 2.0))


def test_none_begins_before_the_one_before_is_written() -> None:
    mtbf = HOUR
    quick, slow = Tier(1.0, 60.0), Tier(1.0, 60.0, writing=400.0)
    assert quick.interval(mtbf) == pytest.approx(math.sqrt(2 * mtbf)) and slow.interval(mtbf) == 400
    assert slow.lost(mtbf) == quick.lost(mtbf, 400.0) > quick.lost(mtbf)
    assert slow.interval(100 * HOUR) == quick.interval(100 * HOUR), "where it is written long before"
    least = least_mtbf((slow,), 0.05)
    assert lost((slow,), least) == pytest.approx(0.05, rel=1e-9) and least > least_mtbf((quick,), 0.05)
    assert two_tiers(slow, Tier(0.1, 1.0, 0.9))[0] == Tier(1.0, 60.0, pytest.approx(0.1), 400.0)


def test_where_a_goal_ends() -> None:
    tiers = two_tiers(Tier(1.0, 300.0), Tier(0.1, 60.0, share=0.9))
    assert lost(tiers, least_mtbf(tiers, 0.01)) == pytest.approx(0.01, rel=1e-9)
    assert least_mtbf((Tier(0.0, 0.0),), 0.01) == 0
    free = Tier(0.0, 60.0)  # a save that costs nothing is always on
    assert free.interval(HOUR) == 0 and free.lost(HOUR) == pytest.approx(60 / HOUR)
    useless = Tier(1.0, 60.0, share=0.0)
    assert useless.interval(HOUR) == math.inf and useless.lost(HOUR) == 0


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--gpus", "1024", "--mtbf-hours", "7.9", "--stall", "1", "--restart", "300", "--step-seconds", "10"])
    printed = capsys.readouterr().out
    own = next(line for line in printed.splitlines() if line.startswith("1,024 *")).split()
    assert own[2:4] == ["7.9", "h"] and own[4:7] == ["4.0", "min", "1.89%"] and own[-1] == "0.81%"
    assert "at most 1.00% lost with durable checkpoints alone: up to 438 GPUs" in printed
    assert "a checkpoint every 23; or a snapshot every 7 and a checkpoint every 75" in printed
    run(["--mtbf-hours", "7.9", "--mtbf-gpus", "1024", "--gpus", "100000", "--snapshot-share", "0", "--stall", "0"])
    printed = capsys.readouterr().out
    assert f"> {HOLDS:.0%}" in printed and "never" in printed and "0 s" in printed
    with pytest.raises(UserError, match="--snapshot-share 1.5: must be at least 0 and at most 1"):
        run(["--snapshot-share", "1.5"])
