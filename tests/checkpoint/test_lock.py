"""Two runs never save to one directory, and a run that was killed keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys

import pytest

from megaforge.checkpoint.lock import LOCK_FILE, take_lock
from megaforge.errors import UserError
from tests.end_to_end.launch import environment

HOLD = """
import sys, time
from pathlib import Path
from megaforge.checkpoint.lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(line, env=environment(), text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_until_the_first_ends_or_is_killed(tmp_path, other):
    with pytest.raises(UserError, match=f"another run saves there .process {other.pid} on .*since 20"):
        take_lock(tmp_path, patience=0.2)
    other.send_signal(signal.SIGKILL)
    lock = take_lock(tmp_path, patience=300)  # waits for it to be gone
    assert (tmp_path / LOCK_FILE).exists()
    lock.release()
    lock.release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_one_that_is_given_back_is_taken_by_who_waits(tmp_path, other):
    other.stdin.write("\n")
    other.stdin.flush()
    take_lock(tmp_path, patience=300).release()


def test_what_a_killed_run_left_is_no_lock(tmp_path):
    (tmp_path / LOCK_FILE).write_text("not even JSON")
    take_lock(tmp_path, patience=0).release()


def test_where_no_lock_can_be_taken(tmp_path, monkeypatch, caplog):
    with pytest.raises(UserError, match=r"--save .*nowhere: .lock cannot be written there"):
        take_lock(tmp_path / "nowhere")

    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unknown)
    take_lock(tmp_path).release()
    assert "its file system knows no locks" in caplog.text


def test_who_holds_it_is_told_where_the_file_says_so(tmp_path, other):
    (tmp_path / LOCK_FILE).write_text("{}")
    with pytest.raises(UserError, match="another run saves there .*is locked"):
        take_lock(tmp_path, patience=0)
