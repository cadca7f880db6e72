"""The progress line of the offline tools."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints how far a run is, in MB/s and tokens/s: in place on a terminal, else a line every ten seconds.

    ``total_bytes`` is the size of the input, or None where it is compressed and so unknown.
    """

    def __init__(self, total_bytes: int | None, label: str, stream: TextIO | None = None) -> None:
        self._total, self._label = total_bytes, label
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.5 if self._terminal else 10.0
        self._start = self._last = time.monotonic()
        self._bytes = self._tokens = 0

    def advance(self, size: int, tokens: int) -> None:
        """Adds ``size`` bytes of input and ``tokens`` tokens of output."""
        self._bytes += size
        self._tokens += tokens
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._print(now, final=False)

    def finish(self) -> None:
        """Prints the last line."""
        self._print(time.monotonic(), final=True)

    def _print(self, now: float, final: bool) -> None:
        elapsed = max(now - self._start, 1e-6)
        rate = self._bytes / elapsed
        done = f"{self._bytes / 1e6:,.1f} MB"
        remaining = ""
        if self._total:
            done += f" of {self._total / 1e6:,.1f} ({min(1.0, self._bytes / self._total):.0%})"
            if not final and rate > 0:
                remaining = f", {max(0.0, (self._total - self._bytes) / rate):,.0f} s left"
        text = (
            f"{self._label}: {done}, {rate / 1e6:,.1f} MB/s, {self._tokens / 1e6:,.2f} M tokens, "
            f"{self._tokens / elapsed / 1e6:,.2f} M tokens/s{remaining}"
        )
        end = "\n" if final or not self._terminal else ""
        self._stream.write(f"\r{text}\033[K{end}" if self._terminal else f"{text}{end}")
        self._stream.flush()
