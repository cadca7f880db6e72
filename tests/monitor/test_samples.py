"""Texts that models wrote, as files keep them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaforge.monitor import jsonl_tail
from megaforge.monitor.samples import SAMPLES_FILE, WrittenText, append_sample, newest_samples


def test_what_generate_writes_is_read(tmp_path: Path) -> None:
    assert newest_samples(tmp_path, 50) == []
    lines = [{"index": 0, "sample": 0, "prompt": "Once", "text": " upon", "tokens": 1, "end": "length"}] * 60
    lines += [{"prompt": 3, "text": "x", "iteration": 7}, {"prompt": "no text"}]
    (tmp_path / SAMPLES_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    found = newest_samples(tmp_path, 50)
    assert found[0] == WrittenText(7, "", "x") and len(found) == 50
    assert found[1] == WrittenText(None, "Once", " upon")


def test_a_run_that_was_killed_writes_its_texts_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration, text in ((10, "a"), (20, "b"), (20, "c\n\u2028")):
        append_sample(tmp_path, WrittenText(iteration, "Once", text))
    append_sample(tmp_path, WrittenText(20, "Twice", ""))
    with (tmp_path / SAMPLES_FILE).open("a") as file:
        file.write('{"iteration": 30, "prom')  # a kill cut it short
    append_sample(tmp_path, WrittenText(30, "Once", "d"))
    found = [(30, "Once", "d"), (20, "Twice", ""), (20, "Once", "c\n\u2028"), (10, "Once", "a")]
    assert newest_samples(tmp_path, 9) == found and newest_samples(tmp_path, 2) == found[:2]
    monkeypatch.setattr(jsonl_tail.JsonlTail.read, "__defaults__", (40,))  # in many pieces
    assert newest_samples(tmp_path, 9) == found
