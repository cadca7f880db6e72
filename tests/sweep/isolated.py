"""Running a script as a process of its own that starts in milliseconds: a fork of one that has torch already."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parents[2]
# What the commands import once their arguments are right; here once for all of them.
HEAVY = (
    *("megaforge.training.setup", "megaforge.inference.restore", "megaforge.inference.evaluation"),
    *("megaforge.inference.prompts", "megaforge.checkpoint.convert", "megaforge.models.parameter_count"),
    *("megaforge.data.preprocess.driver", "tokenizers", "orjson", "matplotlib.pyplot", "torch.utils.tensorboard"),
)


@dataclass(frozen=True)
class Ending:
    """How a process ended: its status (negative: the signal that killed it), what it wrote, and whether it hung."""

    status: int
    out: str
    err: str
    hung: bool


def import_once() -> None:
    """Imports what the commands need, so that each of their forks has it."""
    for module in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def run_forked(
    script: str, arguments: tuple[str, ...], folder: Path, *, closed_stdout: bool = False, seconds: float = 300.0
) -> Ending:
    """Runs ``script`` with ``folder`` as its working directory; nothing it does reaches this process.

    Args:
        arguments: may hold lone surrogates, as the interpreter makes them of bytes that are not UTF-8.
        closed_stdout: nobody reads its standard output, as behind ``| head``.
        seconds: until it counts as hung and is killed.
    """
    # Beside the folder: a run may look at, or complain about, whatever lies in it.
    out, err = folder.with_name(folder.name + ".stdout"), folder.with_name(folder.name + ".stderr")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(script, arguments, folder, None if closed_stdout else out, err)
    deadline, hung, status = time.monotonic() + seconds, False, None
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() > deadline and not hung:
            hung = True
            os.killpg(child, signal.SIGKILL)
        else:
            time.sleep(0.002)
    texts = [p.read_bytes().decode(errors="replace") if p.exists() else "" for p in (out, err)]
    for path in (out, err):
        path.unlink(missing_ok=True)
    return Ending(status, *texts, hung)


def _become(script: str, arguments: tuple[str, ...], folder: Path, out: Path | None, err: Path) -> NoReturn:
    """Turns this forked process into a run of ``script``."""
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        reader, writer = os.pipe()
        os.close(reader)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(writer if out is None else os.open(out, flags), 1)
        os.dup2(os.open(err, flags), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        path = str(REPO / script)
        sys.argv = [path, *arguments]
        sys.path.insert(0, os.path.dirname(path))
        status = _call(path)
    except BaseException as error:  # the sweep's own fault must not run the sweep twice
        os.write(2, f"Traceback of the sweep itself: {error!r}\n".encode())
        status = 70
    os._exit(status)


def _call(path: str) -> int:
    """Status of the script, as the interpreter makes it of what the script raises."""
    try:
        runpy.run_path(path, run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.write(2, f"Traceback at exit: {error!r}\n".encode())
            status = 120
    return status


@dataclass(frozen=True)
class Flag:
    """A flag of a command, as its parser declares it: ``kind`` is int, float, choice, switch or text."""

    name: str
    kind: str
    required: bool
    takes_many: bool


class _Captured(BaseException):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def flags_of(script: str, arguments: tuple[str, ...]) -> list[Flag]:
    """The flags of the parser that ``script`` reads ``arguments`` with."""
    original, argv, path = argparse.ArgumentParser.parse_known_args, sys.argv, list(sys.path)

    def capture(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Captured(parser)

    argparse.ArgumentParser.parse_known_args = capture  # type: ignore[method-assign, assignment]
    sys.argv = [str(REPO / script), *arguments]
    try:
        runpy.run_path(str(REPO / script), run_name="__main__")
    except _Captured as found:
        return [_flag_of(action) for action in found.parser._actions if action.option_strings and action.dest != "help"]
    finally:
        argparse.ArgumentParser.parse_known_args, sys.argv = original, argv  # type: ignore[method-assign]
        sys.path[:] = path
    raise RuntimeError(f"{script} has no argument parser")


def _flag_of(action: argparse.Action) -> Flag:
    setting = getattr(action, "setting", None)
    kind = getattr(setting, "kind", action.type)
    choices = getattr(setting, "choices", None) or action.choices
    positive = [option for option in action.option_strings if not option.startswith("--no-")]
    name = max(positive or action.option_strings, key=len)
    if action.nargs == 0:
        shape = "switch"
    elif choices:
        shape = "choice"
    else:
        shape = {int: "int", float: "float"}.get(kind, "text")  # type: ignore[arg-type]
    return Flag(name, shape, action.required, action.nargs in ("+", "*"))
