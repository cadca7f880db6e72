"""Plans of faults: what is drawn, and that each fault strikes once, where it belongs, on its rank."""

from __future__ import annotations

import errno
import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from megaforge import fault_points
from megaforge.errors import UserError
from megaforge.resilience.faults import (
    ACTIONS,
    KINDS,
    LINGER_SECONDS,
    SLOW_SECONDS,
    VARIABLE,
    Fault,
    Injector,
    Plan,
    arm,
    draw,
    kinds_named,
)
from tests.disk_log import disk_log


def test_what_is_drawn_follows_the_seed_and_has_every_kind_alike():
    faults = draw(1, 60, ranks=8, first=5, stride=4)
    assert faults == draw(1, 60, ranks=8, first=5, stride=4) != draw(2, 60, ranks=8, first=5, stride=4)
    assert [fault.number for fault in faults] == list(range(60))
    counts = Counter(fault.kind for fault in faults)
    assert counts.keys() == KINDS.keys() and max(counts.values()) - min(counts.values()) <= 1
    for before, fault in zip(faults, faults[1:], strict=False):
        if KINDS[fault.kind].point == "load":
            assert KINDS[before.kind].ends and KINDS[before.kind].point != "load", "a load follows what ends the run"
        else:
            assert 5 + 4 * fault.number <= fault.iteration < 9 + 4 * fault.number
        assert fault.rank == 0 or not KINDS[fault.kind].first_rank
    assert {fault.rank for fault in faults} == set(range(8))


def test_a_load_needs_something_that_makes_the_run_load():
    with pytest.raises(ValueError, match="only after a fault that ends the run"):
        draw(1, 2, ranks=1, first=1, stride=1, kinds=("kill mid-load", "slow rank"))


def test_every_kind_has_a_point_and_an_action():
    for kind in KINDS.values():
        assert kind.point in fault_points.POINTS and kind.action in ACTIONS


def _injector(folder, *kinds, rank=0, ranks=None):
    save = folder / "save"
    save.mkdir(exist_ok=True)
    faults = tuple(Fault(n, kind, (ranks or [0] * len(kinds))[n], 3) for n, kind in enumerate(kinds))
    return Injector(Plan(str(save), faults, memory=str(folder / "memory")), rank, folder / "marks")


def test_faults_strike_once_in_their_order_on_their_rank(tmp_path, monkeypatch):
    struck = []
    monkeypatch.setitem(ACTIONS, "sleep", lambda injector, fault, where: struck.append((fault.number, where)))
    first, second = (_injector(tmp_path, "slow rank", "slow rank", rank=rank, ranks=[1, 0]) for rank in (0, 1))
    for iteration in (2, 3):
        first("step", {"iteration": iteration})
        assert not struck, "the one before has not struck"
    second("gradients", {"iteration": 3})
    second("step", {"iteration": 2})
    assert not struck, "another point, another iteration"
    second("step", {"iteration": 4})
    second("step", {"iteration": 5})
    first("step", {"iteration": 5})
    assert struck == [(0, {"iteration": 4}), (1, {"iteration": 5})]
    again = _injector(tmp_path, "slow rank", "slow rank", ranks=[0, 0])
    again("step", {"iteration": 6})
    assert len(struck) == 2, "a run that is started again does not meet them again"
    assert json.loads((tmp_path / "marks" / "fault_000.json").read_text())["iteration"] == 4


def test_the_disk_knows_of_a_fault_before_it_strikes(tmp_path, monkeypatch):
    done = disk_log(tmp_path, monkeypatch)
    monkeypatch.setitem(ACTIONS, "sleep", lambda *_: done.append(("strikes",)))
    _injector(tmp_path, "slow rank")("step", {"iteration": 3})
    assert done == [("fsync", "marks/fault_000.json"), ("strikes",)]


def test_a_file_is_struck_in_its_midst_and_a_disk_without_room_says_so(tmp_path):
    injector = _injector(tmp_path, "disk full", "read-only directory")
    injector("write", {"iteration": 4})
    for number in (errno.ENOSPC, errno.EROFS):
        with pytest.raises(OSError) as caught:
            injector("write", {"iteration": 4})
        assert caught.value.errno == number


def test_a_shard_is_damaged_before_the_kill(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(Injector, "_kill", lambda *_: killed.append(True))
    injector = _injector(tmp_path, "flipped bit", "truncated shard", "missing shard")
    for step in ("step_0000002", "step_0000004", "step_0000005.damaged"):
        (tmp_path / "save" / step).mkdir()
        (tmp_path / "save" / step / "rank_00000.safetensors").write_bytes(bytes(100))
    newest = tmp_path / "save" / "step_0000004" / "rank_00000.safetensors"
    injector("step", {"iteration": 5})
    assert sum(byte.bit_count() for byte in newest.read_bytes()) == 1
    injector("step", {"iteration": 5})
    assert newest.stat().st_size == 50
    injector("step", {"iteration": 5})
    assert not newest.exists() and len(killed) == 3


def test_a_node_is_lost_once_its_memory_is_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(Injector, "_kill", lambda *_: None)
    injector = _injector(tmp_path, "node lost", "damaged snapshot", rank=1, ranks=[1, 1])

    def snapshot(folder: Path, step: int) -> Path:
        path = folder / f"step_{step:07d}" / "rank_00001.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(50))
        return path

    snapshot(tmp_path / "save", 6)
    nodes = [tmp_path / "memory" / f"node_{number}" for number in (0, 1)]
    copies = [snapshot(nodes[0], 7), snapshot(nodes[1], 6)]
    injector("step", {"iteration": 8})
    assert nodes[1].exists(), "the nodes have different snapshots"
    copies[1] = snapshot(nodes[1], 7)
    injector("step", {"iteration": 8})
    assert not nodes[1].exists() and copies[0].exists(), "its peer has the copy"
    snapshot(nodes[1], 7)
    injector("step", {"iteration": 9})
    assert all(sum(byte.bit_count() for byte in copy.read_bytes()) == 1 for copy in copies)


def test_memory_is_forgotten_with_some_faults(tmp_path, monkeypatch):
    monkeypatch.setitem(ACTIONS, "kill", lambda *_: None)
    faults = draw(1, 60, ranks=8, first=5, stride=4)
    assert {fault.forget for fault in faults if fault.kind == "flipped bit"} == {True}
    assert {fault.forget for fault in faults if KINDS[fault.kind].ends} == {True, False}
    memory = tmp_path / "memory"
    memory.mkdir()
    plan = Plan(str(tmp_path), (Fault(0, "kill mid-step", 0, 1, forget=True),), memory=str(memory))
    Injector(plan, 0, tmp_path / "marks")("gradients", {"iteration": 1})
    assert not memory.exists()


def test_the_gradient_of_one_step_is_nan(tmp_path):
    injector, model = _injector(tmp_path, "NaN gradient"), torch.nn.Linear(3, 1)
    for step, finite in ((2, True), (3, False), (4, True)):
        injector("step", {"iteration": step, "model": model})
        model.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        injector("gradients", {"iteration": step, "model": model})
        assert bool(model.weight.grad.isfinite().all()) == finite, step


def test_the_clock_jumps_and_who_is_asked_to_wait_waits_for_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", time.time)
    injector = _injector(tmp_path, "clock jump", "network cut")
    before = time.time()
    injector("step", {"iteration": 3})
    assert time.time() - before > 36 * 3600 - 1
    injector.answer(injector.plan.faults[1]).touch()
    injector("step", {"iteration": 3})


def test_a_run_lingers_until_the_second_job_is_refused(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    injector, other = (_injector(tmp_path, "second job", "slow rank", rank=rank) for rank in (0, 1))
    for iteration in (3, 4, 5):
        for each in (injector, other):
            each("step", {"iteration": iteration})
    assert slept == [LINGER_SECONDS] * 2 and not (tmp_path / "marks" / "fault_001.json").exists()
    injector.answer(injector.plan.faults[0]).touch()
    injector("step", {"iteration": 6})
    assert slept[2:] == [SLOW_SECONDS]


def test_a_plan_is_armed_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    arm(0)
    assert not fault_points.armed()
    path = tmp_path / "plan.json"
    monkeypatch.setenv(VARIABLE, str(path))
    for content, text in (
        ("{", "no plan of faults"),
        ('{"save": "", "own_disk": 0, "memory": "", "node_ranks": 1, "faults": [7]}', "no plan"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=f"{VARIABLE}=.*{text}"):
            arm(0)
    plan = Plan(str(tmp_path), (Fault(0, "disk full", 0, 1),))
    plan.write(path)
    assert Plan.read(path) == plan
    (tmp_path / ".filler").touch()
    try:
        arm(0)
        assert fault_points.armed() and not (tmp_path / ".filler").exists(), "the disk has room again"
        fault_points.reach("write", iteration=1)
        with pytest.raises(OSError, match="No space left"):
            fault_points.reach("write", iteration=1)
    finally:
        fault_points.arm(None)
    Plan("", (Fault(0, "earthquake", 0, 1),)).write(path)
    with pytest.raises(UserError, match="unknown kinds.*earthquake"):
        arm(0)


def test_kinds_are_named_right():
    assert kinds_named(["hang"]) == ["hang"]
    with pytest.raises(UserError, match="--kinds: 'flood' is not a kind of fault"):
        kinds_named(["flood"])
