"""Ends a run that makes no progress, once every rank has told where it is.

One thread a rank counts the time since any rank of the run has told of progress; a second one carries what this rank
does to the others, through the store at which they met. Neither takes part in a collective, and a rank whose main
thread hangs goes on telling.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from megaforge.parallel.context import ParallelContext
from megaforge.resilience.last_words import LastWords, begun_collectives, last_words, verdict, write_recorder

HANG_STATUS = 75  # EX_TEMPFAIL of sysexits.h: another try may succeed
_LOOKS = 20  # in the time after which a run counts as hung
_LEAST_IO = 1 << 20  # bytes read or written that count as progress: a heartbeat's do not


class HostClock:
    """The time that a watchdog counts; another may be given to it."""

    def now(self) -> float:
        """Seconds from some moment on."""
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Until ``event`` is set, or so long; whether it is."""
        return event.wait(seconds)


class Watchdog:
    """Watches this rank's part of a run; :meth:`close` ends that.

    Args:
        timeout: seconds without progress of any rank after which the run ends.
        store: where the ranks leave each other notes, for this object alone; None: there are no others.
        folder: where this rank writes its threads' stacks and torch's flight recorder, or None.
        leave: ends the process with a status.
        clock: what the time is told by.

    Attributes:
        phase: what the rank does, as it was told.
        on_hang: is called with the words of all ranks that said something and what they mean, on the first of these.
    """

    def __init__(
        self,
        ctx: ParallelContext,
        timeout: float,
        store: Store | None = None,
        folder: Path | None = None,
        leave: Callable[[int], object] = os._exit,
        clock: HostClock | None = None,
    ) -> None:
        self.phase = "start"
        self.on_hang: Callable[[dict[int, LastWords], list[str]], None] = lambda words, said: None
        self._ctx, self._timeout, self._store, self._folder, self._leave = ctx, timeout, store, folder, leave
        self._pause = min(max(timeout / _LOOKS, 0.05), 15.0)
        self._clock = clock or HostClock()
        self._told = self._of_others = 0
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if store is not None:
            self._threads.append(threading.Thread(target=self._carry, name="watchdog-beats", daemon=True))
        for thread in self._threads:
            thread.start()

    def tell(self, phase: str) -> None:
        """The rank has come so far that it does ``phase`` now."""
        self.phase = phase
        self._told += 1

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._pause)

    def _signs(self) -> tuple[int, int, int]:
        """What changes when this rank gets on: calls of :meth:`tell`, collectives, MiB of files read or written."""
        collectives = begun_collectives() if self._ctx.world.size > 1 else 0
        return self._told, collectives, moved_bytes() // _LEAST_IO

    def _carry(self) -> None:
        """Counts on the store how often any rank got on. Alone in its thread, as a store may not answer."""
        assert self._store is not None
        signs, mine = self._signs(), 0
        while not self._clock.wait(self._closed, self._pause):
            now = self._signs()
            mine, signs = int(now != signs), now
            try:
                self._of_others = self._store.add("progress", mine)
            except RuntimeError:
                return  # the store's process is gone: what this rank sees itself still counts

    def _watch(self) -> None:
        before, idle, looked = (self._signs(), self._of_others), 0.0, self._clock.now()
        while not self._clock.wait(self._closed, self._pause):
            now = self._clock.now()
            # Time in which this process was stopped, or the machine asleep, is not the others' fault.
            idle, looked = idle + min(now - looked, 2 * self._pause), now
            seen = (self._signs(), self._of_others)
            if seen != before:
                before, idle = seen, 0.0
            if idle >= self._timeout:
                self._end(idle)
                return

    def _end(self, idle: float) -> None:
        own = last_words(self._ctx, self.phase)
        wrote = self._dump()
        said = f"the run hangs: no rank got on for {idle:.4g} s; {own.line()}{wrote}"
        print(said, file=sys.stderr, flush=True)
        words = self._gather(own)
        if own.rank == min(words):
            meant = verdict(words, self._ctx.world.size)
            print(f"error: the run hangs: {'; '.join(meant)}", file=sys.stderr, flush=True)
            self.on_hang(words, meant)
        sys.stdout.flush()
        self._leave(HANG_STATUS)

    def _dump(self) -> str:
        """Writes stacks and recorder; where, as the end of a sentence."""
        if self._folder is None:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return ""
        path = self._folder / f"stacks_{self._ctx.world.rank}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {self.phase}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if self._ctx.world.size > 1:
                _ = write_recorder(self._folder, self._ctx.world.rank)
        except OSError as error:
            return f"; its stacks cannot be written to {path} ({error.strerror})"
        return f"; its threads' stacks are in {path}"

    def _gather(self, own: LastWords) -> dict[int, LastWords]:
        """The words of all ranks that say something within a few looks."""
        words = {own.rank: own}
        if self._store is None:
            return words
        helper = threading.Thread(target=self._exchange, args=(words, self._store), daemon=True)
        helper.start()
        helper.join(8 * self._pause + 2.0)
        return dict(words)

    def _exchange(self, words: dict[int, LastWords], store: Store) -> None:
        own, size = self._ctx.world.rank, self._ctx.world.size
        until = self._clock.now() + 4 * self._pause + 0.5
        with contextlib.suppress(RuntimeError):  # the store is gone: each rank speaks for itself
            store.set(f"words/{own}", words[own].dumps())
            while len(words) < size and self._clock.now() < until:
                for rank in (rank for rank in range(size) if rank not in words):
                    if store.check([f"words/{rank}"]):
                        words[rank] = LastWords.loads(store.get(f"words/{rank}"))
                time.sleep(min(self._pause, 0.1))
            store.add("left", 1)
            while own == 0 and store.add("left", 0) < len(words) and self._clock.now() < until + 1.0:
                time.sleep(0.05)  # its process may hold the store that the others still read


def moved_bytes() -> int:
    """Bytes that this process has read from and written to files so far; 0 where Linux does not tell."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    counts = {name: int(value) for name, _, value in (line.partition(":") for line in text.splitlines())}
    return sum(counts.get(name, 0) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
