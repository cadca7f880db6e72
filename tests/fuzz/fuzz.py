"""One input after another, each read in a process that may die, hang or want too much memory."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megaforge.errors import UserError
from tests.fuzz.mutate import mutated
from tests.fuzz.readers import READERS

SECONDS = 20.0  # that a read of some kilobytes may take, on a busy machine
MEMORY = 2 << 30  # bytes beyond what the process has already
CORPUS = Path(__file__).parent / "corpus"
_CURRENT, _FOUND, _DONE = "current", "found", "done"
_OWN = "fuzzing itself: "


class Finding(NamedTuple):
    """What a reader did not bear.

    Attributes:
        reader: its name.
        content: of the file.
        what: the last line of the exception, and where it was raised; or how the process ended.
    """

    reader: str
    content: bytes
    what: str

    @property
    def name(self) -> str:
        """Of its file in the corpus."""
        return f"{self.reader.replace(' ', '_')}-{hashlib.sha256(self.content).hexdigest()[:12]}"


def fuzz(name: str, seed: int, *, seconds: float = float("inf"), cases: int = 1 << 62) -> tuple[int, list[Finding]]:
    """Reads mutations of the good file of :data:`READERS`; returns how many, and what was found, one of a kind."""
    until, done = time.monotonic() + seconds, 0
    found: dict[str, Finding] = {}
    while time.monotonic() < until and done < cases:
        inputs = _mutations(name, seed, done)
        count, finding = _batch(name, inputs, until, min(cases - done, 500))
        done += count
        if finding is not None:
            found.setdefault(finding.what, finding)
            done += 1
    return done, list(found.values())


def replay(name: str, content: bytes) -> Finding | None:
    """Reads one input."""
    _, finding = _batch(name, iter([content]), time.monotonic() + SECONDS, 1)
    return finding


def _mutations(name: str, seed: int, start: int) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        good = READERS[name].make(Path(folder)).read_bytes()
    while True:  # as many as are asked for
        yield mutated(good, random.Random(f"{name} {seed} {start}"))
        start += 1


def _batch(name: str, inputs: Iterator[bytes], until: float, most: int) -> tuple[int, Finding | None]:
    """Reads ``inputs`` in a fork until a finding, ``until`` or ``most``; how many were right, and the finding."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as home:
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                _read_all(name, inputs, Path(home), until, most)
            except BaseException:
                (Path(home) / _FOUND).write_text(_OWN + traceback.format_exc())
            os._exit(0)
        ending = _wait(child, Path(home) / _CURRENT)
        done = int(text) if (text := _text(Path(home) / _DONE)) else 0
        what = _text(Path(home) / _FOUND) or ending
        if not what:
            return done, None
        if what.startswith(_OWN):
            raise RuntimeError(what)
        return done, Finding(name, (Path(home) / _CURRENT).read_bytes(), what)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _wait(child: int, current: Path) -> str:
    """How the child ended, where that was not by itself."""
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            return (
                ""
                if status == 0
                else f"the process ended with {signal.Signals(-status).name if status < 0 else status}"
            )
        if current.exists() and time.time() - current.stat().st_mtime > SECONDS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"a read took more than {SECONDS:.0f} s"
        time.sleep(0.01)


def _read_all(name: str, inputs: Iterator[bytes], home: Path, until: float, most: int) -> None:
    reader = READERS[name]
    good = home / "good"
    good.mkdir()
    file = reader.make(good)
    logging.disable()
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, has + MEMORY))
    for done in range(most):
        content = next(inputs)
        (home / _CURRENT).write_bytes(content)
        folder = home / "case"
        shutil.copytree(good, folder)
        case = folder / file.relative_to(good)
        case.write_bytes(content)
        try:
            reader.read(case)
        except UserError:
            pass
        except BaseException as error:
            (home / _FOUND).write_text(_described(error))
            return
        shutil.rmtree(folder)
        (home / _DONE).write_text(str(done + 1))
        if time.monotonic() > until:
            return


def _described(error: BaseException) -> str:
    """Type and place: inputs of one kind have one text."""
    last = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "megaforge" in f.filename), None)
    place = f"{Path(last.filename).name}:{last.lineno} in {last.name}" if last else "?"
    return (
        f"{type(error).__name__} at {place}: {str(error)[:120]}"
        if last is None
        else f"{type(error).__name__} at {place}"
    )
