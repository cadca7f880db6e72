"""What is synced, and that nothing stays open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaforge.durable import sync_path


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
