"""Files from a server that breaks connections at any byte: copied whole, and what was copied is not copied again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaforge.data.stream import fetch as fetching
from megaforge.data.stream.fetch import describe, fetch
from megaforge.errors import UserError
from tests.data.datasets import random_documents
from tests.data.file_server import Server, serving
from tests.data.stream.test_source import EOD, TOKENIZER, opened, sample, write_texts


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.001)
    with serving() as found:
        yield found


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
        lambda: describe(f"{server.address}/n"),
    ):
        with pytest.raises(UserError, match="the server answers 404"):
            action()
    before = describe(f"{server.address}/a").identity
    server.refuses_head = True
    assert describe(f"{server.address}/a").identity == before
    server.tag = "two"
    assert describe(f"{server.address}/a").identity != before and len(before) == 32


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
