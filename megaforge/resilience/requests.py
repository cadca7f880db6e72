"""What asks a run to do something between two steps: signals and time ask it to end, time asks for a checkpoint.

Each rank hears for itself; the train step sums what they heard with its other numbers, so that all ranks act after the
same step although a signal may have reached one of them only.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Launchers pass on what the scheduler or the terminal has already sent to every process: the same request twice.
REPEAT_SECONDS = 3.0
LEAD_SHARE, LEAD_MINUTES = 0.1, 15.0  # of a job's time, and at most, that is left for its last checkpoint
SAVE_MINUTES = 30.0  # what a crash may cost where nobody chose a --save-interval


class Requests:
    """What this rank has been asked for.

    Args:
        exit_minutes: minutes from now after which the run shall end; None: never.
        save_minutes: minutes between checkpoints after which one is due; None: never.
        time_over: why the run ends after ``exit_minutes``.
    """

    def __init__(
        self,
        exit_minutes: float | None = None,
        save_minutes: float | None = None,
        time_over: str = "its time is over",
    ) -> None:
        self.exit_minutes, self.save_minutes, self.time_over = exit_minutes, save_minutes, time_over
        self._started = self._saved = time.monotonic()
        self._heard: dict[int, float] = {}
        self._listening = False

    def votes(self) -> list[float]:
        """One number a request, 1.0 where this rank was asked: each of :data:`SIGNALS`, the end of the time, a
        checkpoint. Their sums over the ranks are what :meth:`stop_reason` and :meth:`save_is_due` read."""
        now = time.monotonic()
        over = self.exit_minutes is not None and now - self._started >= 60 * self.exit_minutes
        due = self.save_minutes is not None and now - self._saved >= 60 * self.save_minutes
        return [*(float(number in self._heard) for number in SIGNALS), float(over), float(due)]

    def stop_reason(self, votes: Sequence[float]) -> str | None:
        """Why the run ends after this step, or None, by the ranks' summed ``votes``."""
        if votes[-2]:
            return self.time_over
        return next((number.name for number, count in zip(SIGNALS, votes, strict=False) if count), None)

    @staticmethod
    def save_is_due(votes: Sequence[float]) -> bool:
        """Whether a checkpoint is due by the clock of any rank, by the ranks' summed ``votes``."""
        return votes[-1] > 0

    def saved(self) -> None:
        """A checkpoint was written: the next one is due ``save_minutes`` from now."""
        self._saved = time.monotonic()

    def hear(self, number: int) -> int | None:
        """Takes in signal ``number``; returns the status to leave with at once when it asks a second time."""
        now = time.monotonic()
        self._heard.setdefault(number, now)
        return 128 + number if now - min(self._heard.values()) >= REPEAT_SECONDS else None

    def listen(self, announce: bool) -> None:
        """Hears the process's signals from now on; call it in the main thread when there is something to save, again
        does nothing. Before that a signal ends the process as usual, and nothing is lost.

        A thread reads them: the main thread may be inside a collective that never ends when the second one comes.

        Args:
            announce: whether this rank says what a signal will do.
        """
        if self._listening:
            return
        self._listening = True
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _leave_to_the_thread)
        threading.Thread(target=self._read, args=(reader, writer, announce), name="signals", daemon=True).start()

    def _read(self, reader: socket.socket, writer: socket.socket, announce: bool) -> None:
        while True:  # ends with the process; ``writer`` is held so that its descriptor stays open
            for number in reader.recv(16):
                if number not in SIGNALS:
                    continue
                name, new = signal.Signals(number).name, not self._heard
                status = self.hear(number)
                if status is not None:
                    print(f"{name} again: leaving at once, nothing is saved", file=sys.stderr, flush=True)
                    os._exit(status)
                if new and announce:
                    text = f"{name}: the run ends after this step; another {REPEAT_SECONDS:.0f} s later ends it at once"
                    print(text, file=sys.stderr, flush=True)


def make_requests(config: Config, env: Mapping[str, str] = os.environ) -> Requests:
    """What asks the run of ``config``, which starts now, to end, or, unless ``--save-interval`` says when, to save."""
    minutes = SAVE_MINUTES if config.checkpoint.save and config.checkpoint.save_interval is None else None
    own = config.training.exit_duration_in_mins
    left = minutes_left(config.resilience.exit_lead_minutes, env)
    if left is None or (own is not None and own <= left):
        return Requests(own, minutes, f"--exit-duration-in-mins {own:g} is over" if own else "its time is over")
    print_rank_0(f"the SLURM job's end is known: the run saves and ends in {left:.1f} minutes (--exit-lead-minutes)")
    return Requests(left, minutes, "the SLURM job ends soon")


def minutes_left(lead: float | None, env: Mapping[str, str] = os.environ) -> float | None:
    """Minutes from now until the run should end because its SLURM job does; None: the job has no end that is known, or
    the run does not heed it.

    Args:
        lead: ``--exit-lead-minutes``.
    """
    end = env.get("SLURM_JOB_END_TIME", "")
    if lead == 0 or not end.isdigit():
        return None
    left = (int(end) - time.time()) / 60
    return max(left - (min(LEAD_SHARE * left, LEAD_MINUTES) if lead is None else lead), 0.0)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """The thread has been told through the wakeup descriptor."""
