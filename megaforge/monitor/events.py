"""``events.jsonl``: what happened to a run, one JSON object a line, over all its attempts.

Metrics tell how training goes; events tell what became of it: starts, loads, saves, skipped batches, ends.
``docs/operations.md`` lists the kinds and their fields.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megaforge.durable import sync_path
from megaforge.errors import UserError
from megaforge.json_text import parse_json

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
_OWN = ("time", "kind", "iteration", "uptime")
_LARGEST = 1e18  # of a number of iterations or seconds: more is damage
_FIRST = b'{"time": '  # how each line begins


class EventLog:
    """Appends events to a file, or to nothing: rank 0 of a run with ``--save`` has the file, and all others may call
    the same method. Any thread may."""

    def __init__(self, path: str | os.PathLike[str] | None = None, iteration: Callable[[], int] = lambda: 0) -> None:
        """A last line that a kill cut short is taken out, and told as the event ``mended``.

        Args:
            path: the file, or None.
            iteration: how far the run is when an event is told.

        Attributes:
            listeners: are handed each event too, where there is a file; they must not tell others.

        Raises:
            UserError: the file cannot be read or written.
        """
        self.path = None if path is None else Path(path)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._iteration, self._lock, self._failed = iteration, threading.Lock(), False
        self._within = 0.0
        if self.path is None:
            return
        try:
            cut = _mend(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: events cannot be written there ({error.strerror})") from error
        if cut is not None:
            self.tell("mended", cut=cut)

    def tell(self, kind: str, **fields: Any) -> None:
        """Appends the event ``kind``; when this returns the disk has it. A disk that does not take it is a warning: the
        run is worth more than its diary.

        Args:
            kind: one word.
            fields: JSON values; numbers that are not finite become null.

        Raises:
            ValueError: a field has a name of the log's own.
        """
        if clash := [name for name in _OWN if name in fields]:
            raise ValueError(f"event {kind}: the log itself writes {clash[0]!r}; name the field otherwise")
        if self.path is None:
            return
        with self._lock:
            own = {"time": round(time.time(), 3), "kind": kind, "iteration": self._iteration()}
            event = {**own, "uptime": round(uptime(), 3), **finite(fields)}
            line = json.dumps(event, allow_nan=False)
            for listener in self.listeners:
                listener(event)
            try:
                append_line(self.path, line.encode() + b"\n")
                self._failed = False
            except OSError as error:
                if not self._failed:
                    logger.warning("%s: an event (%s) could not be written: %s", self.path, kind, error)
                self._failed = True

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[dict[str, Any]]:
        """Tells ``kind`` at the end of the block, with the ``seconds`` that it took without those of timed blocks in
        it, the fields that the block gives it, and the ``error`` that ended it. For the main thread."""
        fields: dict[str, Any] = {}
        began, outer, self._within = time.perf_counter(), self._within, 0.0
        try:
            yield fields
        except BaseException as error:
            fields["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            whole = time.perf_counter() - began
            seconds, self._within = whole - self._within, outer + whole
            self.tell(kind, seconds=round(seconds, 3), **fields)


def append_line(path: Path, line: bytes) -> None:
    """Appends ``line`` as a whole and waits until the disk has it.

    Raises:
        OSError: it could not be written, and the file is as it was.
        ValueError: it has no end: the next one would go on with it.
    """
    if not line.endswith(b"\n"):
        raise ValueError(f"{path}: a line without its end is not appended: {line[-40:]!r}")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            if written != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
            if end == 0:
                sync_path(path.parent)  # its name is new
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _mend(path: Path) -> str | None:
    """Makes ``path`` end with a whole line; returns what was cut off, or None.

    Raises:
        UserError: what stands there is not a file of events.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    kept = content.rfind(b"\n") + 1
    torn = content[kept:]
    if not content.startswith(_FIRST[: len(content)]):
        raise UserError(f"{path}: is not a file of events; move it away")
    if not torn:
        return None
    os.truncate(path, kept)
    return torn.decode(errors="backslashreplace")


def finite(value: Any) -> Any:
    """``value``, JSON, with null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def uptime() -> float:
    """Seconds since this process was started, by a clock that nobody sets."""
    born = process_birth("self")
    if born is None:
        return time.monotonic() - _IMPORTED
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - born)


def process_birth(pid: int | str) -> float | None:
    """When a process of this machine was started, in seconds since the machine was: with its number that tells it from
    any other. None: there is no such process, or it has ended and only its parent has not asked yet."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


_IMPORTED = time.monotonic()


class Events(NamedTuple):
    """What a file of events holds.

    Attributes:
        events: in their order.
        torn: a last line that is not whole: the run writes it just now, or was killed at it; None where there is none.
    """

    events: list[dict[str, Any]]
    torn: str | None


def read_events(path: str | os.PathLike[str]) -> Events:
    """All events of a file, in order.

    Raises:
        UserError: it cannot be read, or a line is not an event; nothing is passed over.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    *lines, torn = content.split(b"\n")
    events = [_event(path, number, line) for number, line in enumerate(lines, 1)]
    return Events(events, torn.decode(errors="backslashreplace") if torn else None)


def _event(path: str | os.PathLike[str], number: int, line: bytes) -> dict[str, Any]:
    try:
        event = parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}: line {number} is not JSON ({error})") from error
    if not isinstance(event, dict):
        raise UserError(f"{path}: line {number} is not an event")
    for name in wrong_fields(event):
        raise UserError(f"{path}: line {number} is not an event ({name} is {event.get(name)!r:.80})")
    return event


def wrong_fields(event: Mapping[str, Any]) -> list[str]:
    """Names of the fields without which, or as which, an object is not an event."""
    right = {name: _is_number(event.get(name)) for name in ("time", "uptime")}
    right |= {name: event.get(name) is None or _is_number(event[name]) for name in ("seconds", "stall")}
    right |= {"kind": isinstance(event.get("kind"), str), "iteration": _is_whole(event.get("iteration"))}
    return [name for name, fine in right.items() if not fine]


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST
