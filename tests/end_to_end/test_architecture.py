"""The page on architecture: its files are parts that register themselves, and its lines train with them."""

from __future__ import annotations

import re
from pathlib import Path

from megaforge.monitor.sinks import read_metrics
from tests.end_to_end.launch import REPO
from tests.end_to_end.readme import finish, fresh_copy, run_blocks

PAGE = "docs/architecture.md"


def test_the_parts_of_the_page_train_a_model(tmp_path: Path) -> None:
    home = fresh_copy(tmp_path / "megaforge")
    text = (REPO / PAGE).read_text(encoding="utf-8")
    parts = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL)
    assert len(parts) == text.count("```python") >= 7
    for name, code in parts:
        (home / name).write_text(code, encoding="utf-8")
    shown = [finish(code, home) for code in run_blocks(PAGE)]
    assert "latest-first" in shown[0]
    steps = read_metrics(home / "runs" / "parts.jsonl")
    assert [step["halved"] for step in steps] == [0.0, 1.0, 0.0]
    assert [step["lr"] for step in steps][1] < 0.6 * steps[0]["lr"]
    assert all(step["squares"] > 0 for step in steps) and steps[2]["loss"] < steps[0]["loss"]


def test_each_room_is_listed_in_the_order_of_its_imports() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (REPO / PAGE).read_text(encoding="utf-8"), re.MULTILINE)
    layers = re.search(r"layers = \[(.*?)\]", (REPO / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL)
    assert layers is not None
    order = re.findall(r"megaforge\.(\w+)", layers[1])
    folders = {path.parent.name for path in (REPO / "megaforge").glob("*/__init__.py")}
    assert listed == [room for room in order if room in folders] and set(listed) == folders
