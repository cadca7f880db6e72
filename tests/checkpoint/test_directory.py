"""What happens to a directory of checkpoints, in which order, and which of them stay."""

from __future__ import annotations

import os

import pytest
import torch

from megaforge.checkpoint.checkpoint import load_checkpoint
from megaforge.checkpoint.directory import Retention, commit, commit_fetched, remove_checkpoint
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.manifest import MANIFEST_FILE, SUMS_FILE
from megaforge.checkpoint.shards import TensorEntry
from megaforge.config.checkpoint_config import CheckpointConfig
from megaforge.errors import CheckpointError, UserError
from megaforge.parallel.context import ParallelContext
from tests.checkpoint.model_entries import save_and_retain
from tests.disk_log import disk_log

CTX = ParallelContext.single()
DATA_FILE = "rank_00000.safetensors"


def _save(directory, step, **how):
    return save_and_retain(directory, step, [TensorEntry("x", None, torch.full((4,), float(step)))], {}, CTX, **how)


def _value(path) -> float:
    entry = TensorEntry("x", None, torch.zeros(4))
    load_checkpoint(path, [entry], CTX)
    return entry.tensor[3].item()


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


def _flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_is_fetched_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    done = disk_log(tmp_path, monkeypatch)
    path = commit_fetched(tmp_path, 7, lambda temporary: (temporary / "x").write_text("x"))
    there = ".tmp_step_0000007"
    renamed = [("rename", there, "step_0000007"), ("fsync", ".")]
    assert {done[0], done[1]} == {("fsync", f"{there}/x"), ("fsync", there)} and done[2:] == renamed
    assert (path / "x").read_text() == "x"


def test_what_is_synced_and_renamed_in_which_order(tmp_path, monkeypatch):
    """A kill loses nothing that was written, a power cut what was not synced: a name comes after what it stands for."""
    done, there = disk_log(tmp_path, monkeypatch), ".tmp_step_0000001"
    path = _save(tmp_path, 1)
    at_once = {("fsync", name) for name in (f"{there}/{MANIFEST_FILE}", f"{there}/{SUMS_FILE}", there, ".latest")}
    assert done[0] == ("fsync", f"{there}/{DATA_FILE}") and set(done[1:5]) == at_once
    assert done[5:] == [("rename", there, "step_0000001"), ("replace", ".latest", "latest"), ("fsync", ".")]
    done.clear()
    _flip_bit(path / DATA_FILE, -1)
    with pytest.raises(UserError, match="none of its checkpoints is valid"):
        find_checkpoint(tmp_path, CTX, quarantine_damaged=True)
    assert done == [("rename", "step_0000001", "step_0000001.damaged"), ("fsync", ".")]


def test_what_is_deleted_disappears_at_once(tmp_path, monkeypatch):
    """No reader meets half of a checkpoint."""
    old, done = _save(tmp_path, 1), disk_log(tmp_path, monkeypatch)
    remove_checkpoint(old)
    assert done == [("rename", old.name, f".trash_{old.name}")] and _names(tmp_path) == ["latest"]


def test_one_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    old, rename = _save(tmp_path, 1), os.rename

    def refused(source, target):
        if os.path.basename(source).startswith(".tmp_"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_and_retain(tmp_path, 1, [TensorEntry("x", None, torch.full((4,), 7.0))], {}, CTX)
    assert _value(old) == 1.0 and ".replaced_step_0000001" not in _names(tmp_path)


def test_the_best_alone(tmp_path):
    """The best and the newest, which the run goes on from."""
    keep = Retention.of(CheckpointConfig(keep_best=1, keep_best_only=True))
    assert keep == Retention(last=1, best=1, every=0)
    for step, score in ((1, 5.0), (2, 1.0), (3, 4.0), (4, 3.0)):
        _save(tmp_path, step, keep_last=keep.last, keep_best=keep.best, metric=score)
    assert _names(tmp_path) == ["latest", "step_0000002", "step_0000004"]


def test_the_last_one_known_to_be_whole_stays_while_the_newest_is_not(tmp_path, monkeypatch):
    """A bit that flips on its way to the disk leaves the length as it is."""
    old = _save(tmp_path, 1)

    def faulty_disk(directory, manifest):
        path = commit(directory, manifest)
        _flip_bit(path / DATA_FILE, -1)
        return path

    monkeypatch.setattr("megaforge.checkpoint.directory.commit", faulty_disk)
    with pytest.raises(CheckpointError, match=r"step_0000002 does not read back .* altered.* older ones are kept"):
        _save(tmp_path, 2, keep_last=1)
    assert _names(tmp_path) == ["latest", old.name, "step_0000002.damaged"] and _value(old) == 1.0
