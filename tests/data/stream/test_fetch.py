"""Files from a server that breaks connections at any byte: copied whole, and what was copied is not copied again."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megaforge.data.stream import fetch as fetching
from megaforge.data.stream.fetch import fetch, remote_identity
from megaforge.errors import UserError
from tests.data.datasets import random_documents
from tests.data.stream.test_source import EOD, TOKENIZER, opened, sample, write_texts


class Server(ThreadingHTTPServer):
    """Gives ``files`` by name, and in each answer as many bytes as ``cuts`` says before it breaks the connection.

    Attributes:
        ranges: whether it knows ``Range``.
        sent: bytes of all answers.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cuts, self.ranges, self.sent, self.tag = files, list[int](), True, 0, "one"
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_HEAD(self) -> None:
        self._answer(0)

    def do_GET(self) -> None:
        content = self.server.files.get(self.path.lstrip("/"))
        first, given = 0, self.headers.get("Range")
        if content is not None and given and self.server.ranges and self.headers.get("If-Range") == self.server.tag:
            first = int(given.removeprefix("bytes=").rstrip("-"))
        if content is not None and first >= len(content):
            self.send_error(416)
            return
        self._answer(first)
        if content is not None:
            part = content[first:]
            part = part[: self.server.cuts.pop(0)] if self.server.cuts else part
            self.server.sent += len(part)
            self.wfile.write(part)
            self.close_connection = True

    def _answer(self, first: int) -> None:
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", self.server.tag)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.001)
    with Server({}) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_connections_cut_at_any_byte(server: Server, tmp_path: Path, ranges: bool) -> None:
    rng = random.Random(3)
    content = rng.randbytes(200_000)
    server.files["a.jsonl"], server.ranges = content, ranges
    server.cuts = [rng.randrange(1, 60_000) for _ in range(4)] + [0, 0]
    if not ranges:
        server.cuts = server.cuts[:2] + [0]
    copy = fetch(f"{server.address}/a.jsonl", tmp_path / "deep" / "a.jsonl")
    assert copy.read_bytes() == content and [path.name for path in copy.parent.iterdir()] == ["a.jsonl"]
    assert server.sent == len(content) or not ranges
    assert fetch("http://127.0.0.1:1/none", copy) == copy, "it is there already"


def test_a_killed_copy_goes_on_and_another_file_begins_anew(server: Server, tmp_path: Path) -> None:
    server.files["a"] = bytes(range(256)) * 40
    target = tmp_path / "a"
    Path(f"{target}.part").write_bytes(server.files["a"][:1000])
    Path(f"{target}.mark").write_text("one")
    fetch(f"{server.address}/a", target)
    assert target.read_bytes() == server.files["a"] and server.sent == len(server.files["a"]) - 1000
    for part in (b"something else", b"longer than the whole" * 999):
        target.unlink()
        Path(f"{target}.part").write_bytes(part)
        Path(f"{target}.mark").write_text("one" if len(part) > 99 else "another")
        assert fetch(f"{server.address}/a", target).read_bytes() == server.files["a"]


def test_what_cannot_be_fetched(server: Server, tmp_path: Path) -> None:
    server.files["a"] = b"x" * 100
    server.cuts = [0] * 9
    with pytest.raises(OSError, match=r"the connection broke after 0 of 100 bytes \(tried 4 times\)"):
        fetch(f"{server.address}/a", tmp_path / "a")
    for action in (
        lambda: fetch(f"{server.address}/none", tmp_path / "n"),
        lambda: remote_identity(f"{server.address}/n"),
    ):
        with pytest.raises(UserError, match="the server answers 404"):
            action()
    before = remote_identity(f"{server.address}/a")
    server.tag = "two"
    assert remote_identity(f"{server.address}/a") != before and len(before) == 32


def test_a_stream_from_a_server(server: Server, tmp_path: Path) -> None:
    """The same samples as from the files themselves, though every connection breaks once; copied once."""
    local = write_texts(tmp_path / "text", random_documents(3, 100, 12, EOD))
    for path in (tmp_path / "text").iterdir():
        server.files[path.name] = path.read_bytes()
    names = tmp_path / "files.txt"
    names.write_text("".join(f"{server.address}/{name}\n" for name in sorted(server.files)))
    rng = random.Random(4)
    server.cuts = [rng.randrange(1, 200) for _ in range(6)]
    flags = (*TOKENIZER, "--stream-round", "8")
    far = opened(*flags, "--data-cache-dir", str(tmp_path / "cache"), path=f"stream:@{names}")
    near = opened(*flags, path=local)
    assert [sample(far, k) for k in range(90)] == [sample(near, k) for k in range(90)]
    assert server.sent == sum(map(len, server.files.values()))
    server.tag = "two"
    with pytest.raises(UserError, match="part0.jsonl has changed since the checkpoint"):
        opened(*flags, "--data-cache-dir", str(tmp_path / "c"), path=f"stream:@{names}").check_state(far.state(4))
