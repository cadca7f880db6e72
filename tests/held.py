"""Programs that are held up or killed at a moment that a test has chosen, and does not have to catch."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megaforge.resilience.faults import VARIABLE, Fault, Plan

HANGS = 300.0  # seconds

# Runs at the start of each Python process that finds it on its path.
_SITE = """
import fnmatch, glob, os, signal, sys, time

_opens, _files = [], os.environ["HELD_FILES"]


def publishing(rename):
    def renamed(source, target, **how):
        rename(source, target, **how)
        if fnmatch.fnmatch(os.path.abspath(target), _files) and len(glob.glob(_files)) >= int(os.environ["HELD_COUNT"]):
            stop()

    return renamed


def stop():
    while os.environ["HELD_UNTIL"] and not os.path.exists(os.environ["HELD_UNTIL"]):
        time.sleep(0.01)
    if not os.environ["HELD_UNTIL"] and not _opens:
        _opens.append(int(os.environ["HELD_OPENS"]))


def count(event, arguments):
    if event == "open" and _opens:
        _opens[0] -= 1
        if _opens[0] < 0:
            os.killpg(0, signal.SIGKILL)


sys.addaudithook(count)
os.replace, os.rename = publishing(os.replace), publishing(os.rename)
"""


def until(condition: Callable[[], object]) -> None:
    """Waits for ``condition``, which comes true unless something hangs."""
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def held(
    folder: Path,
    files: str,
    count: int,
    until: Path | None = None,
    *,
    opens: int = 0,
    base: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """The environment of a program any process of which, where it publishes a file or a directory of the pattern
    ``files`` of which there are ``count`` then, goes no further until there is a file ``until``; without one its
    process group is killed then, when that process has opened so many more files.

    Args:
        folder: an empty place.
        base: the environment besides.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE)
    path = os.pathsep.join(filter(None, (str(folder), base.get("PYTHONPATH"))))
    told = {"HELD_FILES": files, "HELD_COUNT": count, "HELD_UNTIL": until or "", "HELD_OPENS": opens}
    return {**base, "PYTHONPATH": path, **{name: str(value) for name, value in told.items()}}


class HeldRun:
    """Has a rank of a run wait before ``iteration``, for a minute or two, until :meth:`release`.

    Attributes:
        variables: what the run's environment needs.
    """

    def __init__(self, folder: Path, iteration: int, rank: int) -> None:
        folder.mkdir()
        self._folder, path = folder, folder / "plan.json"
        Plan(str(folder), (Fault(0, "network cut", rank, iteration),)).write(path)
        self.variables = {VARIABLE: str(path)}

    @property
    def stands(self) -> bool:
        """Whether it waits, or has."""
        return (self._folder / "marks/fault_000.json").exists()

    def release(self) -> None:
        """It goes on."""
        (self._folder / "marks/answer_000").touch()


def time_begins_with(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that a program may take begins once there is ``file``, however late the machine starts it."""
    communicate = subprocess.Popen.communicate

    def patient(self: Any, input: Any = None, timeout: float | None = None) -> Any:
        if timeout is not None:
            until(lambda: file.exists() or self.poll() is not None)
        return communicate(self, input, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", patient)
