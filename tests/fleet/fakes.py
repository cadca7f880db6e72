"""A machine of any size, and models that take no time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megaforge.fleet.machine import GB, Machine
from megaforge.fleet.model import Model
from megaforge.fleet.recipe import Fleet, read_fleet
from megaforge.fleet.resources import ResourceManager
from megaforge.fleet.supervisor import Supervisor


def manager(cpus: int = 64, memory: float = 512, free: float | None = None, load: float = 0.0) -> ResourceManager:
    """Of a machine with so many CPUs and GB."""
    free = memory if free is None else free
    return ResourceManager(machine=lambda: Machine(cpus, memory * GB, free * GB, load))


class FakeJob:
    """Ends with ``status`` after ``polls`` looks at it; with 0 sooner, where it is asked to."""

    def __init__(self, model: Model, status: int, polls: int, memory: float, says: str) -> None:
        self.pid: int | None = None
        self.model, self.status, self.left, self.held = model, status, polls, memory
        self.asked = self.killed = False
        with model.console.open("a") as file:
            file.write(says)

    def poll(self) -> int | None:
        self.left -= 1
        if self.killed or self.asked:
            return -9 if self.killed else 0
        if self.left > 0:
            return None
        if self.status == 0:
            (self.model.directory / "completed").write_text("{}\n")
        return self.status

    def ask_to_end(self) -> None:
        self.asked = True

    def kill(self) -> None:
        self.killed = True

    def look(self) -> None: ...

    def memory(self) -> float:
        return self.held

    def peak_memory(self) -> float:
        return self.held

    def cpu_seconds(self) -> float:
        return 0.0


class Starter:
    """Starts fakes: ``outcomes[name]`` are the statuses of a model's attempts, 0 where none is left.

    Attributes:
        started: (name, threads) in their order.
        most: how many were there at once.
    """

    def __init__(self, polls: int = 3, memory: float = 1.0, says: str = "", **outcomes: Sequence[int]) -> None:
        self.polls, self.memory, self.says = polls, memory, says
        self.outcomes = {name: list(statuses) for name, statuses in outcomes.items()}
        self.started: list[tuple[str, int]] = []
        self.jobs: list[FakeJob] = []
        self.most: list[int] = []

    def __call__(self, model: Model, threads: int) -> FakeJob:
        left = self.outcomes.get(model.name, [])
        status = left.pop(0) if left else 0
        job = FakeJob(model, status, self.polls, self.memory * GB, self.says)
        self.started.append((model.name, threads))
        self.jobs.append(job)
        self.most.append(1 + sum(one.left > 0 and not one.asked for one in self.jobs[:-1]))
        return job

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.started)


def write_fleet(folder: Path, text: str = "", models: Sequence[str] = ("a", "b", "c")) -> Fleet:
    """A fleet below ``folder/out`` of models that differ in their names."""
    listed = "".join(f"  - {{name: {name}}}\n" for name in models)
    flags = "flags: {mock_data: true, vocab_size: 64, train_iters: 4}\n"
    path = folder / "fleet.yaml"
    path.write_text(f"output: {folder / 'out'}\nmonitor_seconds: 60\n{text}{flags}models:\n{listed}")
    return read_fleet(str(path))


def supervise(fleet: Fleet, starter: Starter, machine: ResourceManager | None = None) -> tuple[int, Supervisor]:
    """(status, supervisor) of a whole fleet."""
    supervisor = Supervisor(fleet, machine or manager(), starter)
    return supervisor.run(), supervisor
