"""Starting the dashboard as a user does, and what goes wrong then."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from megaforge.dashboard import serve
from megaforge.errors import UserError
from tests.dashboard.serving import a_run
from tests.end_to_end.launch import command, environment


def _interruptible() -> None:
    """A shell has the signal ignored by what it starts behind an ``&``, tests included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_it_prints_its_address_and_ends_by_a_signal(tmp_path: Path) -> None:
    a_run(tmp_path / "r")
    process = subprocess.Popen(
        command(1, "tools/dashboard.py", "--runs", str(tmp_path), "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=_interruptible,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{32})$", process.stdout.readline().strip())
        assert found is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=300)
        connection.request("GET", "/api/state", headers={"Authorization": f"Bearer {found[2]}"})
        assert b'"name":"r"' in connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (130, "")
    finally:
        process.kill()
        process.communicate()


def test_where_it_cannot_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match="--runs .*none: is not a directory"):
        serve.serve(tmp_path / "none", "127.0.0.1", 0, seconds=1)
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: in use; give another, or 0 for any free one"):
            serve.serve(tmp_path, "127.0.0.1", port, seconds=1)
    with pytest.raises(UserError, match="--host nowhere.invalid"):
        serve.listen("nowhere.invalid", 0)
    with pytest.raises(UserError, match="--host 192.0.2.1: cannot listen there"):
        serve.listen("192.0.2.1", 0)
    if os.getuid():
        with pytest.raises(UserError, match="--port 80"):
            serve.listen("127.0.0.1", 80)


def test_tokens() -> None:
    assert len({serve.token_from(None) for _ in range(9)}) == 9 and len(serve.token_from(None)) == 32
    assert serve.token_from("x" * 16) == "x" * 16
    for bad in ("", "short", "x" * 15, "x" * 16 + ";", "é" * 16, "x" * 16 + "\n"):
        with pytest.raises(UserError, match="MEGAFORGE_DASHBOARD_TOKEN: must be at least 16"):
            serve.token_from(bad)


def test_which_addresses_are_this_machine() -> None:
    assert all(map(serve.is_loopback, ("127.0.0.1", "127.8.8.8", "localhost", "::1")))
    assert not any(map(serve.is_loopback, ("0.0.0.0", "192.0.2.1", "::", "example.org")))


@pytest.mark.parametrize("module", ["uvicorn", "websockets", "psutil"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=rf"needs the Python package '{module}'.*megaforge\[dashboard\]"):
        serve.serve(tmp_path, "127.0.0.1", 0, seconds=1)
