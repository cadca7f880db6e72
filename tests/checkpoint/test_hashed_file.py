"""A file that is hashed and synced while it is written, by one thread and by three."""

from __future__ import annotations

import errno
import hashlib
import os
import threading

import pytest

from megaforge.checkpoint import hashed_file
from megaforge.checkpoint.hashed_file import FileRecord, HashedFile, sync_all

CONTENT = bytes(range(256)) * 40_000  # 10 MB


@pytest.fixture(params=[False, True], ids=["small", "large"])
def size(request, monkeypatch):
    """Of the file as it is told, which decides about threads; blocks are small, so that many wait."""
    monkeypatch.setattr(hashed_file, "_BLOCK", 1 << 14)
    monkeypatch.setattr(hashed_file, "_AHEAD", 3)
    monkeypatch.setattr(hashed_file, "_SYNC", 1 << 20)
    return hashed_file._LARGE if request.param else 0


def _write(path, size) -> FileRecord:
    with HashedFile(path, size) as file:
        for start in range(0, len(CONTENT), 1_000_003):
            file.write(memoryview(CONTENT)[start : start + 1_000_003])
        return file.finish()


def test_length_hash_and_content(tmp_path, size):
    threads = threading.active_count()
    assert _write(tmp_path / "a", size) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert threading.active_count() == threads
    with HashedFile(tmp_path / "empty", size) as file:
        assert file.finish() == (0, hashlib.sha256().hexdigest())


def test_the_last_sync_comes_after_the_last_byte(tmp_path, size, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
    _write(tmp_path / "a", size)
    assert synced == [len(CONTENT)]


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_what_any_sync_meets_is_raised(tmp_path, monkeypatch, call):
    """The system tells of a failed write once: to whichever sync asks first."""
    monkeypatch.setattr(hashed_file, "_SYNC", 1 << 20)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    threads = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "a", hashed_file._LARGE)
    assert threading.active_count() == threads


def test_who_stops_writing_leaves_no_thread(tmp_path, size):
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), HashedFile(tmp_path / "a", size) as file:
        file.write(memoryview(CONTENT))
        raise KeyboardInterrupt
    assert threading.active_count() == threads
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "a", size)


def test_syncs_at_once_wait_for_all_and_raise(tmp_path):
    (tmp_path / "a").write_text("a")
    sync_all([tmp_path / "a", tmp_path])
    with pytest.raises(FileNotFoundError, match="missing"):
        sync_all([tmp_path / "a", tmp_path / "missing", tmp_path])
