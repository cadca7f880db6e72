"""What ``convert_checkpoint.py list`` and ``verify`` say of a directory of checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from megaforge.checkpoint.checkpoint import save_checkpoint
from megaforge.checkpoint.manifest import ChunkRecord, TensorRecord, read_manifest, write_manifest
from megaforge.checkpoint.registry import check_contents, list_checkpoints, verify_checkpoints
from megaforge.checkpoint.shards import TensorEntry
from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from tests.checkpoint.model_entries import save_simulated
from tools.convert_checkpoint import main

CTX = ParallelContext.single()
FILE = "rank_00000.safetensors"


def _save(directory: Path, step: int, metric: float | None = None) -> Path:
    entries = [TensorEntry("a", None, torch.full((3, 4), float(step))), TensorEntry("b", None, torch.ones(()))]
    return save_checkpoint(directory, step, entries, {}, CTX, metric=metric)


def _run(monkeypatch: pytest.MonkeyPatch, *line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *line])
    return main()


def test_a_flipped_bit_is_found_by_reading_and_a_lost_end_by_looking(tmp_path: Path) -> None:
    paths = [_save(tmp_path, step, metric=3.5 / step) for step in (1, 2, 3)]
    with open(paths[0] / FILE, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.truncate(paths[1] / FILE, 40)
    (paths[2] / "manifest.json").rename(paths[2] / "elsewhere.json")
    (tmp_path / "step_0000009.damaged").mkdir()
    listed = {row.name: row for row in list_checkpoints(tmp_path)}
    assert list(listed) == ["step_0000003", "step_0000002", "step_0000001", "step_0000009.damaged"]
    assert listed["step_0000001"].problem is None and listed["step_0000001"][1] == 1
    assert (listed["step_0000001"].metric, listed["step_0000001"].layout) == (3.5, "one rank")
    assert "40 bytes instead of" in str(listed["step_0000002"].problem)
    assert all("manifest.json is missing" in str(listed[name].problem) for name in list(listed)[::3])
    verified = {row.name: row.problem for row in verify_checkpoints(tmp_path)}
    assert "has been altered" in str(verified["step_0000001"]) and None not in verified.values()


def test_whole_ones_of_any_layout(tmp_path: Path) -> None:
    save_simulated(tmp_path, 4, 2, 2)
    [row] = verify_checkpoints(tmp_path)
    [same] = verify_checkpoints(tmp_path / "step_0000004")
    assert row == same and (row.problem, row.step, row.layout) == (None, 4, "tp 2, dp 2, etp 2, edp 2")
    assert row.bytes == sum(path.stat().st_size for path in (tmp_path / row.name).glob("*.safetensors"))


def test_a_manifest_that_does_not_match_its_files(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    manifest = read_manifest(path)
    a = manifest.tensors["a"]
    for record, said in (
        (a._replace(chunks=(ChunkRecord(FILE, (0, 0), (2, 4)),)), "a: "),
        (a._replace(dtype="BF16"), "holds no a of BF16"),
        (TensorRecord("F32", (5,), (ChunkRecord(FILE, (0,), (5,)),)), "holds no c of F32"),
    ):
        tensors = {**manifest.tensors, "c" if "c of" in said else "a": record}
        altered = dataclasses.replace(manifest, tensors=tensors)
        write_manifest(path, altered)
        problem = check_contents(path, altered)
        assert problem is not None and said in problem.text
        [row] = verify_checkpoints(path)
        assert row.problem == problem.text


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2, metric=0.25)
    assert _run(monkeypatch, "list", str(tmp_path)) == 0
    header, newest, older = capsys.readouterr().out.splitlines()
    assert header.split() == ["checkpoint", "written", "bytes", "layout", "score", "state"]
    assert newest.startswith("step_0000002  20") and newest.endswith("one rank  0.25   there (latest)")
    assert older.endswith("-      there")
    assert _run(monkeypatch, "verify", str(tmp_path), "--json") == 0
    assert [json.loads(line)["problem"] for line in capsys.readouterr().out.splitlines()] == [None, None]
    (path / FILE).write_bytes(b"")
    assert _run(monkeypatch, "list", str(tmp_path)) == 0 and _run(monkeypatch, "verify", str(tmp_path)) == 1
    assert "has 0 bytes instead of" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for where, said in (("nowhere", "no such directory"), ("empty", "no checkpoint")):
        with pytest.raises(UserError, match=said):
            _run(monkeypatch, "verify", str(tmp_path / where))
