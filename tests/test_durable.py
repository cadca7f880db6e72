"""What is synced, and that nothing stays open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaforge.durable import replacing, sync_path
from tests.disk_log import disk_log


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_path_is_synced_and_closed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    synced: list[int] = []

    def failing(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        raise OSError(5, "Input/output error")

    before = len(os.listdir("/proc/self/fd"))
    sync_path(tmp_path / name)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        sync_path(tmp_path / name)
    assert synced == [(tmp_path / name).stat().st_ino] and len(os.listdir("/proc/self/fd")) == before


def test_a_file_is_replaced_once_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = disk_log(tmp_path, monkeypatch)
    (tmp_path / "file").write_text("old")
    (tmp_path / ".file.tmp").write_text("what a killed process left")
    with replacing(tmp_path / "file") as part:
        assert not part.exists()
        part.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert done == [("fsync", ".file.tmp"), ("replace", ".file.tmp", "file"), ("fsync", ".")]
    assert (tmp_path / "file").read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("where", ["block", "fsync", "replace"])
def test_a_failure_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    if where != "block":
        monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "file", tmp_path / "mine") as part:
        part.write_text("new")
        if where == "block":
            full()
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_file_taken_away_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with replacing(tmp_path / "file") as part:
        part.write_text("new")
        part.unlink()
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]
