"""``samples.jsonl`` in a run's directory: what its model wrote, as it trained (``--generate-prompts``) or when it was
asked (``tools/generate.py --json``)."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from megaforge.monitor.events import append_line
from megaforge.monitor.jsonl_tail import JsonlTail

SAMPLES_FILE = "samples.jsonl"


class WrittenText(NamedTuple):
    """What a model wrote behind ``prompt``, after how many iterations where that is known."""

    iteration: int | None
    prompt: str
    text: str


def append_sample(directory: Path, written: WrittenText) -> None:
    """Appends it as a line of its own.

    Raises:
        OSError: it could not be written.
    """
    path, line = directory / SAMPLES_FILE, json.dumps(written._asdict()).encode() + b"\n"
    append_line(path, line if _ends_a_line(path) else b"\n" + line)


def _ends_a_line(path: Path) -> bool:
    """Not where a kill cut the last line short."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def newest_samples(directory: Path, most: int) -> list[WrittenText]:
    """At most ``most``, the newest first. Of texts after one iteration from one prompt, which a run wrote again that
    was killed after it, the newer one counts."""
    tail = JsonlTail(directory / SAMPLES_FILE)
    lines = deque[WrittenText](maxlen=4 * most)
    while True:
        lines.extend(written for record in tail.read() if (written := _written(record)) is not None)
        if not tail.behind:
            break
    found, known = list[WrittenText](), set[tuple[int, str]]()
    for one in reversed(lines):
        if one.iteration is not None:
            if (one.iteration, one.prompt) in known:
                continue
            known.add((one.iteration, one.prompt))
        found.append(one)
    return found[:most]


def _written(record: dict[str, Any]) -> WrittenText | None:
    text, iteration, prompt = (
        record.get("text", record.get("completion")),
        record.get("iteration"),
        record.get("prompt"),
    )
    if not isinstance(text, str):
        return None
    told = iteration if type(iteration) is int else None
    return WrittenText(told, prompt if isinstance(prompt, str) else "", text)
