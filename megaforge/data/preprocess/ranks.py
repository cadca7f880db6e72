"""The ranks of a preprocessing run under mpirun or srun, and what they tell each other: a few lines of JSON.

``mpirun`` ranks talk through mpi4py. ``srun`` ranks need no library: they talk through small files beside the output,
which lies on a file system they share anyway.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megaforge.config.launcher import MPI_LAUNCHERS, discover_launch
from megaforge.errors import UserError, require

_HEARTBEAT_SECONDS = 5.0
_SILENCE_SECONDS = 180.0


class RankGroup(ABC):
    """``size`` processes, of which this is ``rank``."""

    rank: int = 0
    size: int = 1

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-like ``value``, in rank order, on every rank; waits for all."""

    def close(self) -> None:  # noqa: B027  most groups have nothing to end
        """Ends the group's conversation; called once by every rank that still can."""


class SingleRank(RankGroup):
    """One process on its own."""

    def gather(self, value: Any) -> list[Any]:
        """See :class:`RankGroup`."""
        return [value]


class MpiRanks(RankGroup):
    """The ranks of an MPI launcher, through mpi4py."""

    def __init__(self) -> None:
        self._comm = require("mpi4py.MPI", extra="mpi", purpose="preprocessing on several mpirun ranks").COMM_WORLD
        self.rank, self.size = int(self._comm.Get_rank()), int(self._comm.Get_size())

    def gather(self, value: Any) -> list[Any]:
        """See :class:`RankGroup`."""
        return [json.loads(text) for text in self._comm.allgather(json.dumps(value))]


class FileRanks(RankGroup):
    """Ranks that share a directory: message n of rank r is the file ``n-r.json``.

    A rank that dies stops its heartbeat, and the others give up on it instead of waiting for ever.
    """

    def __init__(
        self, directory: Path, rank: int, size: int, silence: float = _SILENCE_SECONDS, poll: float = 0.2
    ) -> None:
        self.rank, self.size = rank, size
        self._directory, self._silence, self._poll = directory, silence, poll
        self._round = 0
        self._broken = False
        self._stop = threading.Event()
        directory.mkdir(exist_ok=True)
        self._beat(0)
        threading.Thread(target=self._beat_on, daemon=True).start()

    def gather(self, value: Any) -> list[Any]:
        """See :class:`RankGroup`.

        Raises:
            UserError: a rank has been silent for too long.
        """
        self._write(f"{self._round}-{self.rank}.json", value)
        values = [self._wait_for(rank) for rank in range(self.size)]
        self._round += 1
        return values

    def close(self) -> None:
        """Rank 0 removes the directory once every rank has read everything."""
        if self._broken:
            return
        _ = self.gather(None)
        self._stop.set()
        if self.rank:
            self._write(f"bye-{self.rank}.json", None)
            return
        limit = time.monotonic() + self._silence
        while time.monotonic() < limit:
            if all((self._directory / f"bye-{rank}.json").exists() for rank in range(1, self.size)):
                break
            time.sleep(self._poll)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _wait_for(self, rank: int) -> Any:
        path = self._directory / f"{self._round}-{rank}.json"
        pulse, since = None, time.monotonic()
        while True:
            try:
                return json.loads(path.read_bytes())
            except (FileNotFoundError, ValueError):
                time.sleep(self._poll)
            latest = self._pulse(rank)
            if latest != pulse:
                pulse, since = latest, time.monotonic()
            elif time.monotonic() - since > self._silence:
                self._broken = True
                raise UserError(f"rank {rank} of {self.size} has been silent for {self._silence:.0f} s; run it again")

    def _pulse(self, rank: int) -> str | None:
        try:
            return (self._directory / f"alive-{rank}.json").read_text()
        except FileNotFoundError:
            return None

    def _beat_on(self) -> None:
        beats = 0
        while not self._stop.wait(_HEARTBEAT_SECONDS):
            beats += 1
            try:
                self._beat(beats)
            except OSError:
                return  # the directory is gone: the run is over

    def _beat(self, beats: int) -> None:
        self._write(f"alive-{self.rank}.json", beats)

    def _write(self, name: str, value: Any) -> None:
        temporary = self._directory / f"{name}.tmp-{self.rank}"
        temporary.write_text(json.dumps(value), encoding="utf-8")
        os.replace(temporary, self._directory / name)


def together(group: RankGroup, action: Callable[[], Any]) -> list[Any]:
    """Runs ``action`` on every rank; if it fails on one, all raise, so that none waits for a rank that has left."""
    value: Any = None
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:
        failure = error
    message = None if failure is None else f"{'' if group.size == 1 else f'rank {group.rank}: '}{failure}"
    answers = group.gather([value, message])
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    failures = [str(error) for _, error in answers if error is not None]
    if failures:
        raise UserError(failures[0])
    return [value for value, _ in answers]


def discover_ranks(output_prefix: str, environment: Mapping[str, str] = os.environ) -> RankGroup:
    """The group this process was launched in: mpirun's, srun's, or one rank.

    Raises:
        UserError: torchrun started several.
    """
    launch = discover_launch(environment)
    if launch.world_size == 1:
        return SingleRank()
    if launch.launcher in MPI_LAUNCHERS:
        return MpiRanks()
    if launch.launcher != "srun":
        raise UserError(
            f"RANK={launch.rank} WORLD_SIZE={launch.world_size}: ranks of torchrun cannot share this work; use "
            "--workers N on one machine, and srun or mpirun on several"
        )
    run = ".".join(environment.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return FileRanks(Path(f"{output_prefix}.ranks-{run}"), launch.rank, launch.world_size)
