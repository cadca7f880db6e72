"""Where metrics go: the sink protocol, and the JSONL file that a resumed run continues exactly."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from megaforge.durable import set_aside
from megaforge.errors import UserError
from megaforge.json_text import parse_json

Kind = Literal["step", "evaluation", "test"]
_KINDS = ("step", "evaluation", "test")


class MetricSink(Protocol):
    """Takes one record a training step, one an evaluation, and one of a test at the end."""

    def write(self, kind: Kind, iteration: int, values: Mapping[str, float | int]) -> None:
        """Takes ``values`` as they stand after ``iteration``."""
        ...

    def flush(self) -> None:
        """Makes everything written so far durable: a checkpoint of the same iteration follows."""
        ...

    def close(self) -> None:
        """Ends the sink; nothing is written afterwards."""
        ...


class JsonlSink:
    """One JSON object a line: ``{"kind": "step" | "evaluation" | "test", "iteration": int, ...values}``.

    Floats are written so that they read back bit for bit; NaN and infinities become null, which JSON can hold.
    """

    def __init__(self, path: str | os.PathLike[str], resume_iteration: int | None) -> None:
        """Opens ``path`` to append to it.

        Args:
            resume_iteration: where the run goes on: what its last rows there say of later iterations is moved to
                ``PATH.abandoned``. None: a new run, whose rows follow those of earlier ones.

        Attributes:
            notice: what to tell the user about rows that were there, or None.

        Raises:
            UserError: the file cannot be written, or holds anything but metrics; it is left as it is.
        """
        self.path = Path(path)
        self.notice: str | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise UserError(f"--metrics-file {path}: is a directory; name a file, such as {self.path / 'm.jsonl'}")
            self._durable = self.path.is_file() or not self.path.exists()  # a pipe or /dev/stdout holds nothing
            if self.path.is_file():
                self.notice = prepare_to_append(self.path, resume_iteration)
            self._file: BinaryIO = self.path.open("ab")
        except OSError as error:
            raise UserError(f"--metrics-file {path}: cannot be written ({error.strerror})") from error

    def write(self, kind: Kind, iteration: int, values: Mapping[str, float | int]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"kind": kind, "iteration": iteration, **finite}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def go_back(self, iteration: int) -> None:
        """What was written of later iterations is moved to ``PATH.abandoned``: they are made again."""
        if self.path.is_file():
            self._file.close()
            _ = prepare_to_append(self.path, iteration)
            self._file = self.path.open("ab")

    def flush(self) -> None:
        self._file.flush()
        if self._durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def prepare_to_append(path: Path, resume_iteration: int | None) -> str | None:
    """Leaves in a metrics file what a run that goes on after ``resume_iteration`` (None: a new run) appends to.

    Only rows of the file's last run are ever taken out, and they go to the end of ``PATH.abandoned``. A last line that
    a kill cut short goes.

    Returns:
        What to tell the user, or None.

    Raises:
        UserError: a line is not a metrics record; nothing has been changed.
    """
    ends, begins, iterations = [0], 0, list[int]()  # where rows end, the last run's first row
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and _cut_short(line):
                break
            kind, iteration = _row(path, number, line)
            if kind == "step" and iterations and iteration <= iterations[-1]:
                begins = len(iterations)
            iterations.append(iteration)
            ends.append(ends[-1] + len(line))
    kept = len(iterations)
    if resume_iteration is not None:
        late = (row for row in range(begins, kept) if iterations[row] > resume_iteration)
        kept = next(late, kept)
    set_aside(path, ends[kept], ends[-1])
    if moved := len(iterations) - kept:
        return (
            f"--metrics-file {path}: {moved} rows of iterations after {resume_iteration}, where this run goes on, "
            f"were moved to {path}.abandoned"
        )
    if resume_iteration is None and iterations:
        return f"--metrics-file {path}: it holds {len(iterations)} rows of earlier runs; this run's follow them"
    return None


_HEAD = b'{"kind": "'


def _cut_short(line: bytes) -> bool:
    """Whether a last line without its end looks like the beginning of a record."""
    return line.startswith(_HEAD) or _HEAD.startswith(line)


def _row(path: Path, number: int, line: bytes) -> tuple[str, int]:
    try:
        record = parse_json(line)
        kind, iteration = record["kind"], record["iteration"]
        if kind not in _KINDS or type(iteration) is not int:
            raise ValueError("not a kind of record")
        return kind, iteration
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--metrics-file {path}: line {number} is not a metrics record, so the file is left alone; name another"
        ) from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a metrics file, in order.

    Raises:
        UserError: the file is missing, is not UTF-8, or a line is not JSON or not a record.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"metrics file {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"metrics file {path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse_json(line))
        except ValueError as error:
            raise UserError(f"metrics file {path}: line {number} is not JSON ({error})") from error
        if not _is_record(records[-1]):
            raise UserError(
                f"metrics file {path}: line {number} is not a record of a run ({line[:60]}); "
                "name what --metrics-file wrote"
            )
    return records


def _is_record(value: Any) -> bool:
    """Whether it is an object whose iteration, loss and tokens are numbers as far as its kind has them."""
    if not isinstance(value, dict):
        return False
    if value.get("kind") not in _KINDS:
        return True
    measured = (value.get(name) for name in ("loss", "tokens"))
    return isinstance(value.get("iteration"), int) and all(isinstance(v, (int, float, type(None))) for v in measured)
