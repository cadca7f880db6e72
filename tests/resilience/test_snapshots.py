"""The folder of a node's snapshots: at any moment one is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megaforge.checkpoint.checkpoint import load_checkpoint, take_snapshot
from megaforge.checkpoint.directory import remove_checkpoint
from megaforge.checkpoint.registry import verify_checkpoints
from megaforge.checkpoint.shards import TensorEntry
from megaforge.errors import CheckpointError
from megaforge.parallel.context import ParallelContext
from megaforge.resilience import snapshots
from megaforge.resilience.nodes import Nodes
from megaforge.resilience.snapshots import SnapshotStore

CTX = ParallelContext.single()


def store_of(folder: Path, run: str = "mine") -> SnapshotStore:
    return SnapshotStore(CTX, folder / "memory", Nodes(((0,),)), run)


def write(store: SnapshotStore, step: int) -> Path:
    return store.write(take_snapshot(step, [TensorEntry("x", None, torch.full((9,), float(step)))], {}, CTX), CTX)


def value_of(path: Path | None) -> float:
    assert path is not None
    tensor = torch.zeros(9)
    load_checkpoint(path, [TensorEntry("x", None, tensor)], CTX)
    assert (tensor == tensor[0]).all()
    return float(tensor[0])


def names(store: SnapshotStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.name != "latest")


def test_the_one_before_stays_until_the_new_one_is_whole(tmp_path, monkeypatch: pytest.MonkeyPatch):
    store = store_of(tmp_path)
    assert store.find(0) is None
    path = write(store, 1)
    assert [row.problem for row in verify_checkpoints(path)] == [None], "of the form of any checkpoint"

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    for where in ("write_own_file", "commit"):
        with monkeypatch.context() as patch:
            patch.setattr(snapshots, where, full)
            with pytest.raises(CheckpointError, match="No space left"):
                write(store, 2)
        assert names(store) == ["step_0000001"] and value_of(store.find(0)) == 1

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "remove_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            write(store, 2)
    assert names(store) == ["step_0000001", "step_0000002"], "between the two"
    shutil.copytree(path, store.folder / ".tmp_step_0000003")  # what a kill leaves of one
    again = store_of(tmp_path)
    assert value_of(again.find(0)) == 2 and again.find(2) is None
    write(again, 4)
    assert names(again) == ["step_0000004"] and value_of(again.find(0)) == 4
    remove_checkpoint(store.folder / "step_0000004")
    assert again.find(0) is None
    again.remove()
    assert not store.folder.exists()


def test_what_is_not_whole_or_not_ours_is_passed_over(tmp_path, caplog: pytest.LogCaptureFixture):
    store = store_of(tmp_path)
    write(store, 1)
    shutil.copytree(store.folder, tmp_path / "kept")
    write(store, 2)
    shutil.copytree(tmp_path / "kept", store.folder, dirs_exist_ok=True)
    assert store_of(tmp_path, "another").find(0) is None
    [file] = (store.folder / "step_0000002").glob("rank_*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert value_of(store.find(0)) == 1
    assert "has been altered" in caplog.text and "step 2" in caplog.text and "trying an older state" in caplog.text
    (store.folder / "step_0000001" / "manifest.json").write_text("{}")
    assert store.find(0) is None and "is not what SHA256SUMS says" in caplog.text
    store.clear(keep=store.folder / "step_0000002")
    assert names(store) == ["step_0000002"]
