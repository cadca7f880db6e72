"""Faults on purpose: a seeded plan of what goes wrong in a run, and where, and the hands that do it.

The plan is a JSON file that the environment variable :data:`VARIABLE` names; without it nothing is armed. Each fault
strikes once, in the order of the plan, however often the run is started again: a file beside the plan says that it has.
What a fault leaves behind (a full disk, a read-only directory) is put right when the run next starts, as a person would
have done by then.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megaforge import fault_points
from megaforge.errors import UserError
from megaforge.json_text import parse_json

VARIABLE = "MEGAFORGE_FAULTS"
PATIENCE = 120.0  # seconds that a rank waits for what the test bed does outside of it
_DAMAGES = ("truncate", "flip", "delete")  # of checkpoints, which nobody would look at beside a snapshot
CLOCK_JUMP = 36 * 3600.0
SLOW_SECONDS = 3.0
LINGER_SECONDS = 4.0  # of a step: less than what others wait


class Kind(NamedTuple):
    """One kind of fault.

    Attributes:
        point: where it strikes (:data:`megaforge.fault_points.POINTS`).
        action: what happens there, one of :data:`ACTIONS`.
        ends: whether this attempt of the run ends by it.
        first_rank: whether only rank 0 comes there.
        in_memory: whether it is about snapshots in memory, and waits until one is newer than every checkpoint.
    """

    point: str
    action: str
    ends: bool = True
    first_rank: bool = False
    in_memory: bool = False


KINDS = {
    "kill mid-step": Kind("gradients", "kill"),
    "kill mid-save": Kind("write", "kill"),
    "kill before the rename": Kind("rename", "kill", first_rank=True),
    "kill before latest": Kind("latest", "kill", first_rank=True),
    "kill mid-load": Kind("load", "kill"),
    "hang": Kind("gradients", "stop"),
    "slow rank": Kind("step", "sleep", ends=False),
    "truncated shard": Kind("step", "truncate"),
    "flipped bit": Kind("step", "flip"),
    "missing shard": Kind("step", "delete"),
    "disk full": Kind("write", "fill"),
    "read-only directory": Kind("write", "lock up"),
    "NaN gradient": Kind("step", "nan"),
    "node lost": Kind("step", "lose node", in_memory=True),
    "damaged snapshot": Kind("step", "spoil", in_memory=True),
    "clock jump": Kind("step", "clock", ends=False),
    "second job": Kind("step", "linger", ends=False, first_rank=True),
    "stale rendezvous": Kind("step", "ask", first_rank=True),
    "network cut": Kind("step", "ask"),
}


@dataclass(frozen=True)
class Fault:
    """One fault of a plan.

    Attributes:
        number: its place in the plan, from 0.
        kind: one of :data:`KINDS`.
        rank: of which process.
        iteration: not before this one.
        forget: whether the snapshots in memory are lost with it, on all nodes.
    """

    number: int
    kind: str
    rank: int
    iteration: int
    forget: bool = False


@dataclass(frozen=True)
class Plan:
    """What will go wrong.

    Attributes:
        save: the run's ``--save``.
        faults: in their order.
        own_disk: whether ``save`` is a file system of its own, which may be filled and made read-only; else the write
            is told that it is.
        memory: folder of the run's snapshots, with one of each node in it; none where it is empty.
        node_ranks: how many ranks in a row make a node.
    """

    save: str
    faults: tuple[Fault, ...]
    own_disk: bool = False
    memory: str = ""
    node_ranks: int = 1

    def write(self, path: Path) -> None:
        """Keeps the plan as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """
        Raises:
            UserError: it is not there, or no plan.
        """
        try:
            fields = parse_json(path.read_bytes())
            faults = tuple(
                Fault(int(f["number"]), str(f["kind"]), int(f["rank"]), int(f["iteration"]), bool(f["forget"]))
                for f in fields["faults"]
            )
            memory, node_ranks = str(fields["memory"]), int(fields["node_ranks"])
            plan = cls(str(fields["save"]), faults, bool(fields["own_disk"]), memory, node_ranks)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{VARIABLE}={path}: no plan of faults ({error}); unset it to train without any") from error
        if unknown := {fault.kind for fault in faults} - KINDS.keys():
            raise UserError(f"{VARIABLE}={path}: unknown kinds {sorted(unknown)}; there are {', '.join(KINDS)}")
        return plan


def draw(
    seed: int, count: int, *, ranks: int, first: int, stride: int, kinds: Iterable[str] = tuple(KINDS)
) -> tuple[Fault, ...]:
    """``count`` faults, of every kind as often as of any other, in an order, on ranks and in iterations that ``seed``
    chooses.

    Args:
        ranks: world size.
        first: iteration from which on they come.
        stride: iterations from one to the next.

    Raises:
        ValueError: a load is to be struck, and nothing makes the run load.
    """
    chance = random.Random(seed)
    pool = list(kinds)
    chance.shuffle(pool)
    chosen = (pool * -(-count // len(pool)))[:count]
    chance.shuffle(chosen)
    loads = [kind for kind in chosen if KINDS[kind].point == "load"]
    others = [kind for kind in chosen if KINDS[kind].point != "load"]
    ending = [place for place, kind in enumerate(others) if KINDS[kind].ends]
    if len(loads) > len(ending):
        raise ValueError("a load is struck only after a fault that ends the run; add kinds that do")
    after = set(chance.sample(ending, len(loads)))
    faults: list[Fault] = []
    for place, kind in enumerate(others):
        iteration = first + len(faults) * stride + chance.randrange(stride)
        rank = 0 if KINDS[kind].first_rank else chance.randrange(ranks)
        alike = chance.random() < 0.5
        forget = KINDS[kind].action in _DAMAGES or (alike and KINDS[kind].ends and not KINDS[kind].in_memory)
        faults.append(Fault(len(faults), kind, rank, iteration, forget))
        if place in after:
            faults.append(Fault(len(faults), "kill mid-load", chance.randrange(ranks), 0))
    return tuple(faults)


class Injector:
    """Lets the faults of ``plan`` that belong to ``rank`` strike; their marks lie in ``marks``."""

    def __init__(self, plan: Plan, rank: int, marks: Path) -> None:
        self.plan, self.rank, self.marks = plan, rank, marks
        self._writes = 0
        self.until_step_end: list[Callable[[], None]] = []
        marks.mkdir(parents=True, exist_ok=True)
        self._next = sum(self._mark(fault).exists() for fault in plan.faults)

    def __call__(self, point: str, where: dict[str, Any]) -> None:
        """What :func:`megaforge.fault_points.reach` tells."""
        if point == "write":
            self._writes += 1
        if point == "gradients":
            while self.until_step_end:
                self.until_step_end.pop()()
        if point == "step":
            self._linger_on()
        fault = self._due()
        if fault is None or fault.rank != self.rank or KINDS[fault.kind].point != point:
            return
        if where.get("iteration", fault.iteration) < fault.iteration or (point == "write" and self._writes < 2):
            return  # a file is struck in its midst
        if KINDS[fault.kind].in_memory and not self._memory_is_newest():
            return
        with open(self._mark(fault), "x", encoding="utf-8") as mark:
            json.dump({"time": time.time(), "kind": fault.kind, "iteration": where.get("iteration")}, mark)
            mark.flush()
            os.fsync(mark.fileno())
        if fault.forget and self.plan.memory:
            shutil.rmtree(self.plan.memory, ignore_errors=True)
        ACTIONS[KINDS[fault.kind].action](self, fault, where)

    def put_right(self) -> None:
        """Undoes what earlier attempts met: the disk has room again, and can be written."""
        if any(self._mark(fault).exists() for fault in self.plan.faults if fault.kind == "read-only directory"):
            if self.plan.own_disk:
                _remount(self.plan.save, "rw")
        self._filler.unlink(missing_ok=True)

    def answer(self, fault: Fault) -> Path:
        """The file by which the test bed says that what was to happen outside of the run has happened."""
        return self.marks / f"answer_{fault.number:03d}"

    def _due(self) -> Fault | None:
        """The first fault that has not struck, anywhere."""
        while self._next < len(self.plan.faults) and self._mark(self.plan.faults[self._next]).exists():
            self._next += 1
        if self._next == len(self.plan.faults) or self._lingering() is not None:
            return None
        return self.plan.faults[self._next]

    def _lingering(self) -> Fault | None:
        """The newest fault, where the run has to be there until the test bed has an answer."""
        fault = self.plan.faults[self._next - 1] if self._next else None
        if fault is None or KINDS[fault.kind].action != "linger" or self.answer(fault).exists():
            return None
        return fault

    def _linger_on(self) -> None:
        """Makes steps slow, but makes them: a run that stands still would be ended."""
        _ = self._due()
        fault = self._lingering()
        if fault is not None and fault.rank == self.rank:
            time.sleep(LINGER_SECONDS)

    def _mark(self, fault: Fault) -> Path:
        return self.marks / f"fault_{fault.number:03d}.json"

    @property
    def _filler(self) -> Path:
        return Path(self.plan.save) / ".filler"

    def _shard(self) -> Path:
        """A file of tensors of the newest checkpoint."""
        files = sorted(_steps(Path(self.plan.save))[-1].glob("rank_*"))
        return files[self.rank % len(files)]

    def _nodes(self) -> list[Path]:
        return sorted(Path(self.plan.memory).glob("node_*")) if self.plan.memory else []

    def _own_node(self) -> Path:
        return Path(self.plan.memory) / f"node_{self.rank // self.plan.node_ranks}"

    def _memory_is_newest(self) -> bool:
        """Whether all nodes have one snapshot that is newer than every checkpoint."""
        newest = {_newest(node) for node in self._nodes()}
        return len(newest) == 1 and newest.pop() > _newest(Path(self.plan.save))

    def _kill(self, fault: Fault, where: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self, fault: Fault, where: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _sleep(self, fault: Fault, where: dict[str, Any]) -> None:
        time.sleep(SLOW_SECONDS)

    def _truncate(self, fault: Fault, where: dict[str, Any]) -> None:
        shard = self._shard()
        os.truncate(shard, shard.stat().st_size // 2)
        self._kill(fault, where)

    def _flip(self, fault: Fault, where: dict[str, Any]) -> None:
        _flip_bit(self._shard(), random.Random(fault.number))
        self._kill(fault, where)

    def _delete(self, fault: Fault, where: dict[str, Any]) -> None:
        self._shard().unlink()
        self._kill(fault, where)

    def _lose_node(self, fault: Fault, where: dict[str, Any]) -> None:
        shutil.rmtree(self._own_node())
        self._kill(fault, where)

    def _spoil(self, fault: Fault, where: dict[str, Any]) -> None:
        """Every copy of one rank's file in memory loses a bit: the run has to do with what is on the disk."""
        name = next(path.name for path in sorted(_steps(self._own_node())[-1].glob("rank_*")))
        for node in self._nodes():
            for path in _steps(node)[-1].glob(name):
                _flip_bit(path, random.Random(fault.number))
        self._kill(fault, where)

    def _fill(self, fault: Fault, where: dict[str, Any]) -> None:
        if not self.plan.own_disk:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(self._filler, "wb", buffering=0) as file:
            try:
                while True:  # ends with the disk
                    file.write(bytes(1 << 16))
            except OSError:
                return  # full, which the run is about to find out

    def _lock_up(self, fault: Fault, where: dict[str, Any]) -> None:
        """A file that is open for writing keeps a file system from becoming read-only: the write is told so first."""
        if self.plan.own_disk:
            _remount(self.plan.save, "ro", check=False)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _nan(self, fault: Fault, where: dict[str, Any]) -> None:
        """The gradient of one parameter, in this step's backward passes on this rank."""
        parameter = next(each for each in where["model"].parameters() if each.requires_grad)
        self.until_step_end.append(parameter.register_hook(lambda gradient: gradient * float("nan")).remove)

    def _clock(self, fault: Fault, where: dict[str, Any]) -> None:
        """What Python sees of the clock, until the process ends."""
        real = time.time
        time.time = lambda: real() + CLOCK_JUMP

    def _linger(self, fault: Fault, where: dict[str, Any]) -> None:
        """From now on steps take their time, until the answer is there."""

    def _ask(self, fault: Fault, where: dict[str, Any]) -> None:
        """Waits while the test bed does something outside of the run."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not self.answer(fault).exists():
            time.sleep(0.05)


ACTIONS: dict[str, Callable[[Injector, Fault, dict[str, Any]], None]] = {
    "kill": Injector._kill,
    "stop": Injector._stop,
    "sleep": Injector._sleep,
    "truncate": Injector._truncate,
    "flip": Injector._flip,
    "delete": Injector._delete,
    "lose node": Injector._lose_node,
    "spoil": Injector._spoil,
    "fill": Injector._fill,
    "lock up": Injector._lock_up,
    "nan": Injector._nan,
    "clock": Injector._clock,
    "ask": Injector._ask,
    "linger": Injector._linger,
}


def arm(rank: int) -> None:
    """Lets the faults of the plan that :data:`VARIABLE` names strike this process; nothing where it is not set.

    Raises:
        UserError: it names no plan.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    injector = Injector(Plan.read(Path(path)), rank, Path(path).parent / "marks")
    injector.put_right()
    fault_points.arm(injector)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints or snapshots there, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.name[5:].isdigit())


def _newest(folder: Path) -> int:
    steps = _steps(folder)
    return int(steps[-1].name[5:]) if steps else -1


def _flip_bit(path: Path, chance: random.Random) -> None:
    with open(path, "r+b") as file:
        place = chance.randrange(file.seek(0, os.SEEK_END))
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << place % 8]))


def _remount(directory: str, how: str, check: bool = True) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", directory], check=check, capture_output=True)


def kinds_named(names: Sequence[str]) -> list[str]:
    """
    Raises:
        UserError: one is not a kind.
    """
    for name in names:
        if name not in KINDS:
            raise UserError(f"--kinds: {name!r} is not a kind of fault; there are {', '.join(map(repr, KINDS))}")
    return list(names)
