"""Looks of a :class:`megaforge.monitor.wait_sampler.WaitSampler` when a test asks for them, not by a clock."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

_HANGS = 300  # seconds; a look takes microseconds


class Looks:
    """Takes the place of the sampler's rest: a look follows when the thread that is watched asks for it, at a line that
    the watched thread does not leave before the look is over. Built for one sampler."""

    def __init__(self) -> None:
        # A lock's own methods are not Python's: the watched thread's innermost frame is the one that calls them.
        go, over = threading.Lock(), threading.Lock()
        go.acquire()
        over.acquire()
        self._go: Any = go
        self._over: Any = over
        self._work: Any = SimpleNamespace(wait=over.acquire)
        self._looking = False

    def rest(self, closed: threading.Event) -> bool:
        """For the sampler."""
        if self._looking:
            self._looking = False
            self._over.release()
        while not self._go.acquire(timeout=0.01):
            if closed.is_set():
                return True
        self._looking = True
        return False

    def at_work(self, times: int = 1) -> None:
        """So many looks while this thread does something of its own."""
        for _ in range(times):
            assert self._go.release() or self._over.acquire(timeout=_HANGS)

    def waiting(self, times: int = 1) -> None:
        """So many looks while it waits for work that was handed over."""
        for _ in range(times):
            assert self._go.release() or self._work.wait(timeout=_HANGS)
