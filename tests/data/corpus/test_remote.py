"""Sources behind addresses: the corpus that the files themselves give, though connections break and runs are killed."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaforge.data.corpus import report
from megaforge.data.corpus.job import read_job
from megaforge.data.corpus.partition import read_partition
from megaforge.data.corpus.pipeline import CorpusSettings, prepare_corpus
from megaforge.data.corpus.remote import file_name, remote_reader
from megaforge.data.corpus.sources import Unit, expected_bytes, whole_files
from megaforge.data.corpus.work import Work
from megaforge.data.stream import fetch as fetching
from megaforge.data.stream.fetch import RemoteFile
from megaforge.errors import UserError
from tests.data.corpus.test_pipeline import Killed, contents, counted
from tests.data.file_server import Server, serving

RECIPE = """
partition_mb: 0.02
sources:
  - {name: s, files: [FILES], domain: web}
stages: [length, exact]
shard: {jsonl: true}
"""
NAMES = ("part-{00..03}.jsonl", "last.jsonl.gz", "table.parquet", "page.html")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(report, "draw_pictures", lambda *arguments: [])
    with serving() as found:
        yield found


def write_files(folder: Path, server: Server) -> None:
    """The same files for both: beside the recipe, and on the server."""
    source = random.Random(7)
    texts = [f"document {n}: " + "word " * source.randint(10, 300) for n in range(120)]
    lines = [json.dumps({"text": text, "url": f"http://h/{n}"}) + "\n" for n, text in enumerate(texts)]
    for number in range(4):
        server.files[f"part-{number:02}.jsonl"] = "".join(lines[20 * number : 20 * number + 20]).encode()
    server.files["last.jsonl.gz"] = gzip.compress("".join(lines[80:100]).encode())
    pq.write_table(pa.table({"text": texts[90:]}), folder / "table.parquet")
    server.files["table.parquet"] = (folder / "table.parquet").read_bytes()
    server.files["page.html"] = b"<html><body>" + b"<p>a page of its own</p>" * 9 + b"</body></html>"
    for name, content in server.files.items():
        (folder / name).write_bytes(content)


def settings(folder: Path, files: str, output: str = "out", **others: Any) -> CorpusSettings:
    (folder / f"{output}.yaml").write_text(RECIPE.replace("FILES", files))
    return CorpusSettings(str(folder / f"{output}.yaml"), str(folder / output), **others)


def addresses(server: Server) -> str:
    return ", ".join(f'"{server.address}/{name}"' for name in NAMES)


def documents(output: Path) -> list[tuple[Any, ...]]:
    """What the lineage says of each document, the names of files apart."""
    rows = [row for file in sorted((output / "lineage").iterdir()) for row in pq.read_table(file).to_pylist()]
    return sorted((row["path"].rpartition("/")[2], row["place"], row["digest"], row["reason"] or "") for row in rows)


def test_the_documents_of_the_files_though_connections_break(server: Server, tmp_path: Path) -> None:
    write_files(tmp_path, server)
    prepare_corpus(settings(tmp_path, "part-0*.jsonl, last.jsonl.gz, table.parquet, page.html", "near"))
    source = random.Random(2)
    server.cuts = [source.randrange(1, 3000) for _ in range(12)]
    far = settings(tmp_path, addresses(server))
    prepare_corpus(far)
    assert server.sent == sum(map(len, server.files.values())), "what was copied is not copied again"
    assert documents(tmp_path / "out") == documents(tmp_path / "near")
    rows = [row for file in (tmp_path / "out" / "lineage").iterdir() for row in pq.read_table(file).to_pylist()]
    assert {row["url"] for row in rows if row["path"].endswith("page.html")} == {f"{server.address}/page.html"}
    assert not list((tmp_path / "out" / "work").glob("*")) or not list((tmp_path / "out" / "work").glob("copies/*"))
    undisturbed = settings(tmp_path, addresses(server), "again", workers=2)
    prepare_corpus(undisturbed)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_killed_run_goes_on_within_the_file(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed by a task's end and in the middle of a copy: what lies there is used."""
    write_files(tmp_path, server)
    far = settings(tmp_path, addresses(server))
    with monkeypatch.context() as patch:
        counted(patch, 2)
        with pytest.raises(Killed):
            prepare_corpus(far)
    finished, sent = Work(tmp_path / "out" / "work").finished("segment0"), server.sent
    assert len(finished) == 2
    server.cuts = [100] + [0] * 9
    with pytest.raises(UserError, match=r"the connection broke after 100 of .*run the same command again"):
        prepare_corpus(far)
    server.cuts = []
    kept = next((tmp_path / "out" / "work" / "copies").glob("*.part"))
    assert kept.stat().st_size == 100 and server.sent == sent + 100
    prepare_corpus(far)
    prepare_corpus(settings(tmp_path, addresses(server), "again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_what_is_not_there_or_has_changed(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, server)
    missing = f"'{server.address}/part-00.jsonl', '{server.address}/none.jsonl', '{server.address}/x.png'"
    with pytest.raises(UserError, match=r"none.jsonl: the server answers 404 .*correct the address, or pass"):
        prepare_corpus(settings(tmp_path, missing))
    server.files["x.png"] = b"\x89PNG"
    prepare_corpus(settings(tmp_path, missing, on_error="skip"))
    skipped = (tmp_path / "out" / "files.skipped.tsv").read_text()
    assert "404" in skipped and "x.png\tnot text by its name or type" in skipped
    with pytest.raises(UserError, match=r"127.0.0.1:1/a.jsonl: .*nothing was begun: run the same command again"):
        prepare_corpus(settings(tmp_path, "'http://127.0.0.1:1/a.jsonl'", "dead", on_error="skip"))
    far = settings(tmp_path, addresses(server), "changed")
    with monkeypatch.context() as patch:
        counted(patch, 1)
        with pytest.raises(Killed):
            prepare_corpus(far)
    job = read_job(tmp_path / "changed")
    server.tag = "two"
    with pytest.raises(UserError, match=r"part-03.jsonl changed since the run began; run the command again"):
        list(read_partition(job, 3))
    prepare_corpus(far)


def test_names_and_types_choose_readers() -> None:
    cases = {
        ("http://h/a/b.jsonl.gz?token=x.y", ""): "lines", ("http://h/docs/", "text/html"): "html",
        ("s3://bucket/c.parquet", ""): "table", ("http://h/paper", "application/pdf"): "pdf",
        ("http://h/picture", "image/png"): None, ("http://h/", ""): None,
    }  # fmt: skip
    for (address, kind), reader in cases.items():
        assert remote_reader(address, RemoteFile(9, "m", kind)) == reader, address
    assert file_name("http://h/a/b.jsonl.gz?token=x.y#z") == "b.jsonl.gz"


def test_sizes_of_files_on_servers() -> None:
    def unit(name: str, size: int) -> Unit:
        return Unit(0, f"http://h/{name}", f"http://h/{name}", "lines", size, "m", 0)

    assert [expected_bytes(unit(name, 5)) for name in ("a.jsonl.gz?b=c", "a.jsonl")] == [20, 5]
    assert whole_files([unit("a.jsonl", 1 << 30)])[0].endswith("split into several files it is shared")
