"""A model as a group of processes: started, measured, asked to end, and ended whole."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MARK = "MEGAFORGE_FLEET_MODEL"  # in the environment of each process of a model, however it was started


class Job(Protocol):
    """One attempt at training a model."""

    pid: int | None

    def poll(self) -> int | None:
        """The exit status once all of it has ended, negative for a signal; None before."""
        ...

    def ask_to_end(self) -> None:
        """Asks it to save and end; a second time does nothing."""
        ...

    def kill(self) -> None:
        """Ends every process of it now."""
        ...

    def look(self) -> None:
        """Measures it; what follows says what was seen."""
        ...

    def memory(self) -> float:
        """Bytes that it holds."""
        ...

    def peak_memory(self) -> float:
        """The most bytes that it has held, as far as was seen."""
        ...

    def cpu_seconds(self) -> float:
        """Processor time of the processes that are there."""
        ...


class LocalJob:
    """Processes of this machine. They have a session of their own, so that Ctrl-C reaches the supervisor alone; where
    that is killed, the kernel asks them to save and end."""

    def __init__(self, line: list[str], log: Path, environment: Mapping[str, str], patience: float) -> None:
        """Starts ``line`` with its output at the end of ``log``.

        Args:
            patience: seconds in which ranks whose torchrun has gone may save, before they are killed.

        Raises:
            OSError: it cannot be started, or the log not written.
        """
        self._mark, self._asked, self._patience = uuid.uuid4().hex, False, patience
        self._status: int | None = None
        self._gone: float | None = None  # when the first process ended
        self._peak, self._held, self._cpu = 0.0, 0.0, 0.0
        parent = os.getpid()
        libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None

        def die_with_the_supervisor() -> None:
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:  # it ended before the kernel knew
                    os.kill(os.getpid(), signal.SIGTERM)

        with log.open("ab") as file:
            self._process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment, _MARK: self._mark},
                start_new_session=True,
                preexec_fn=die_with_the_supervisor,  # the supervisor has one thread
            )
        self.pid: int | None = self._process.pid

    def poll(self) -> int | None:
        if self._status is None and (status := self._process.poll()) is not None:
            self._gone = self._gone or time.monotonic()
            if any(True for _ in marked(self._mark)):  # ranks of a torchrun that was killed: they are about to save
                if time.monotonic() - self._gone < self._patience:
                    return None
                self.kill()
            self._status = status
        return self._status

    def ask_to_end(self) -> None:
        if not self._asked:
            self._asked = True
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends every process of it, also those that others have started, and waits until they are gone."""
        while found := list(marked(self._mark)):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.01)
        self._process.wait()

    def look(self) -> None:
        held = peak = cpu = 0.0
        for pid in marked(self._mark):
            found = _measured(pid)
            held, peak, cpu = held + found[0], peak + found[1], cpu + found[2]
        self._held, self._peak, self._cpu = held, max(self._peak, peak), cpu

    def memory(self) -> float:
        return self._held

    def peak_memory(self) -> float:
        return self._peak

    def cpu_seconds(self) -> float:
        return self._cpu


def marked(mark: str) -> Iterator[int]:
    """Numbers of the processes of this machine whose environment has ``mark``; those that have ended and wait for their
    parents are not among them: their environment has gone."""
    wanted = f"{_MARK}={mark}".encode()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if wanted in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    yield int(name)


def _measured(pid: int) -> tuple[float, float, float]:
    """(bytes resident now, the most so far, processor seconds) of a process; zeros once it has gone."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS:", "VmHWM:"))}
        ticks = int(stat[11]) + int(stat[12])
        return 1024.0 * int(sizes["VmRSS"]), 1024.0 * int(sizes["VmHWM"]), ticks / os.sysconf("SC_CLK_TCK")
    return 0.0, 0.0, 0.0
