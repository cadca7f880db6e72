"""``skipped.jsonl`` below ``--save``: the samples that a run leaves out, told before it goes on.

A checkpoint knows those that were left out before it; a run that starts again from an earlier one finds the others
here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaforge.data.skipped import Stretch
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.json_text import parse_json

SKIP_FILE = "skipped.jsonl"


def read_skips(run: Path) -> list[Stretch]:
    """The stretches that the file in ``run`` names, in its order; none where there is no file. A last line that is not
    whole was never acted upon.

    Raises:
        UserError: it cannot be read, or holds anything else.
    """
    file = run / SKIP_FILE
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return [_stretch(file, number, line) for number, line in enumerate(lines[:-1], 1)]


def _stretch(file: Path, number: int, line: bytes) -> Stretch:
    try:
        record: Any = parse_json(line)
        first, stop = record["first"], record["stop"]
        if type(first) is int and type(stop) is int and 0 <= first < stop:
            return first, stop
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file}: line {number} is not a stretch of samples; restore the file, or move it away")


def add_skip(run: Path, stretch: Stretch, **why: Any) -> None:
    """Appends a stretch; when this returns the disk has it.

    Raises:
        OSError: it could not be written.
    """
    file = run / SKIP_FILE
    whole = file.read_bytes() if file.exists() else b""
    if not whole.endswith(b"\n"):
        whole = whole[: whole.rfind(b"\n") + 1]
    with replacing(file) as temporary:
        temporary.write_bytes(whole + json.dumps({"first": stretch[0], "stop": stretch[1], **why}).encode() + b"\n")


def set_skips_aside(run: Path) -> Path | None:
    """Renames the file of a run whose samples are not those of the one that begins; its new name, None without one."""
    file = run / SKIP_FILE
    if not file.exists():
        return None
    target, count = file.with_name(f"{SKIP_FILE}.abandoned"), 0
    while target.exists():
        count += 1
        target = file.with_name(f"{SKIP_FILE}.abandoned.{count}")
    file.rename(target)
    return target
