"""Where metrics go: the sink protocol, and the JSONL file that a resumed run continues exactly."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from megaforge.errors import UserError

Kind = Literal["step", "evaluation"]


class MetricSink(Protocol):
    """Takes one record a training step and one an evaluation."""

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
    """One JSON object a line: ``{"kind": "step" | "evaluation", "iteration": int, ...values}``.

    Floats are written so that they read back bit for bit; NaN and infinities become null, which JSON can hold.
    """

    def __init__(self, path: str | os.PathLike[str], resume_iteration: int) -> None:
        """Opens ``path`` to go on after ``resume_iteration``: what an interrupted run wrote beyond it is cut off.

        A run from iteration 0 takes an existing file out of the way as ``PATH.old``.

        Raises:
            UserError: the file cannot be written, or is no metrics file.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_iteration == 0 and self.path.exists() and self.path.stat().st_size:
                os.replace(self.path, self.path.with_name(self.path.name + ".old"))
            elif self.path.exists():
                truncate_after(self.path, resume_iteration)
            self._file: BinaryIO = self.path.open("ab")
        except OSError as error:
            raise UserError(f"--metrics-file {path}: cannot be written ({error.strerror})") from error

    def write(self, kind: Kind, iteration: int, values: Mapping[str, float | int]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"kind": kind, "iteration": iteration, **finite}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def truncate_after(path: Path, iteration: int) -> None:
    """Cuts a metrics file before its first record of a later iteration, or before a half-written last line.

    Raises:
        UserError: a complete line is not a metrics record.
    """
    kept = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            if _iteration_of(path, number, line) > iteration:
                break
            kept += len(line)
    if kept < path.stat().st_size:
        os.truncate(path, kept)


def _iteration_of(path: Path, number: int, line: bytes) -> int:
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--metrics-file {path}: line {number} is no metrics record, so the file is left alone; name another file"
        ) from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a metrics file, in order.

    Raises:
        UserError: the file is missing or a line is not JSON.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"metrics file {path}: cannot be read ({error.strerror})") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"metrics file {path}: line {number} is not JSON ({error})") from error
    return records
