"""How far a phase is, on stderr: a line that is written over on a terminal, and now and then a line elsewhere."""

from __future__ import annotations

import sys
import time

_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 30.0


class Progress:
    """Counts the finished tasks of one phase."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done = label, total, done
        self._terminal = sys.stderr.isatty()
        self._began = self._last = time.monotonic()
        self._fresh = 0

    def advance(self) -> None:
        """One more is finished."""
        self._done += 1
        self._fresh += 1
        now = time.monotonic()
        if now - self._last >= (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            self._last = now
            left = (now - self._began) / self._fresh * (self._total - self._done)
            end = "\r" if self._terminal else "\n"
            print(
                f"{self._label}: {self._done:,} of {self._total:,}, about {left:,.0f} s left   ",
                end=end,
                file=sys.stderr,
            )

    def finish(self) -> None:
        """Ends the line."""
        if self._terminal and self._fresh:
            print(f"{self._label}: {self._done:,} of {self._total:,}" + " " * 30, file=sys.stderr)
