"""Readers: every cut of a file into ranges gives each record once; what is not a document says why."""

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
import zstandard

from megaforge.data.corpus import sources
from megaforge.data.corpus.readers import hub, lines
from megaforge.data.corpus.readers.reader import Reader, reader_for, reader_named
from megaforge.data.corpus.recipe import SourceSettings
from megaforge.data.corpus.sources import Unit, whole_files
from megaforge.data.jsonl import LineReader
from megaforge.errors import UserError

SOURCE = SourceSettings(name="s", files=("x",))
RECORDS: list[Any] = [
    {"text": "one", "url": "http://a/1", "license": "CC0", "date": 2024},
    {"text": "zwölf"},
    {"text": ""},
    {"other": "x"},
    {"text": 3},
    {"text": "\u6f22" * 50, "url": None},
    {"text": "last", "license": ["MIT"]},
]


def gather(
    reader: Reader, path: Path, cuts: list[int | None], source: SourceSettings = SOURCE
) -> list[tuple[Any, ...]]:
    found = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        for rows in reader.read(str(path), source, start or 0, stop):
            columns = [rows.fields.get(name, [None] * len(rows.texts)) for name in ("url", "licence", "date")]
            found += list(zip(rows.places, rows.texts, rows.reasons, *columns, strict=True))
    return found


def test_json_lines_are_cut_anywhere(tmp_path: Path) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    lines[2:2] = ["", "[1]", "{broken"]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    reader = reader_named("lines")
    size = reader.places(str(path), SOURCE)
    whole = gather(reader, path, [0, None])
    assert size == path.stat().st_size and len(whole) == 9
    assert whole[0][1:] == ("one", None, "http://a/1", "CC0", "2024") and whole[-1][3:] == (None, None, None)
    why = [row[2] for row in whole if row[2] is not None]
    assert why[0] == "the line is JSON but not an object" and why[1].startswith("not valid JSON")
    assert why[2:] == ["the record has no key 'text' (text_field)", "'text' is not a string (3)"]
    content = path.read_bytes()
    for row in whole:
        assert row[1] is None or content[row[0] :].startswith(b'{"text": "' + row[1].encode())
    for cut in range(0, size + 1, 7):
        assert gather(reader, path, [0, cut, None]) == whole, cut
    assert reader.line(str(path), whole[3][0]) == ", line 5"
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        packed = tmp_path / f"x.jsonl{suffix}"
        packed.write_bytes(pack(content))
        assert reader.places(str(packed), SOURCE) == 0 and gather(reader, packed, [0, None]) == whole
        packed.write_bytes(pack(content)[:-9])
        with pytest.raises(UserError, match="damaged or cut short"):
            gather(reader, packed, [0, None])


def test_rows_are_cut_anywhere(tmp_path: Path) -> None:
    good = [record for record in RECORDS if isinstance(record.get("text"), str)]
    table = pa.table(
        {
            "text": pa.array([record["text"] for record in good] + [None]),
            "license": pa.array([None] * len(good) + ["X"]),
            "n": list(range(len(good) + 1)),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("x.parquet", "x.arrow"):
        path = tmp_path / name
        reader = reader_named(reader_for(name) or "")
        assert reader.places(str(path), SOURCE) == 6
        whole = gather(reader, path, [0, None])
        assert [row[1] for row in whole] == [*(record["text"] for record in good), None]
        assert [row[0] for row in whole] == list(range(6)) and whole[-1][2:5] == (
            "'text' is not a string (None)",
            None,
            None,
        )
        for cut in range(7):
            assert gather(reader, path, [0, cut, None]) == whole
        with pytest.raises(UserError, match=r"no column 'body' \(text_field\); there are text, license, n"):
            reader.places(str(path), SourceSettings(name="s", files=("x",), text_field="body"))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match="damaged|not a table"):
            gather(reader, path, [0, None])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<p>é</p>".encode(), "<p>é</p>"),
        ('<meta charset="ISO-8859-1"><p>é’</p>'.encode("cp1252"), '<meta charset="ISO-8859-1"><p>é’</p>'),
        (
            '<META http-equiv=Content-Type content="text/html; charset=shift_jis">漢字'.encode("shift_jis"),
            '<META http-equiv=Content-Type content="text/html; charset=shift_jis">漢字',
        ),
        ("\ufeff<p>ok</p>\r\n".encode("utf-16"), "<p>ok</p>\n"),
    ],
)
def test_pages_are_read_in_the_encoding_that_they_declare(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    path.write_bytes(content)
    reader = reader_named(reader_for(str(path)) or "")
    assert reader.kind(str(path)) == "html"
    assert [row[1].lstrip("\ufeff") for row in gather(reader, path, [0, None])] == [text]


def test_manual_pages_keep_their_words(tmp_path: Path) -> None:
    page = r"""
.\" comment
.TH LS 1 "June 2024" "GNU" "User Commands"
.de X
hidden
..
.SH NAME
ls \- list
.SH "SEE \fBALSO\fR"
.BR dir (1),
.B "all files"
.Op Fl l Ar name
.TP
\fB\-a\fR, \(lqx\(rq
do not ignore \e and \[u00E9]\s-1s\s0
.nf
  a
    b
.fi
"""
    (tmp_path / "man1").mkdir()
    path = tmp_path / "man1" / "ls.1.gz"
    path.write_bytes(gzip.compress(page.encode()))
    assert reader_for(str(path)) == "man" and reader_for("lib/libz.so.1") is None
    assert gather(reader_named("man"), path, [0, None])[0][1] == (
        "NAME\n\nls - list\n\nSEE ALSO\n\ndir(1),\nall files\n-l name\n\n-a, “x”\ndo not ignore \\ and és\n  a\n    b\n"
    )


def pdf_of(lines: list[str]) -> bytes:
    """The smallest PDF with a page a line."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(lines)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(lines)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, line in enumerate(lines):
        shown = f"BT /F1 12 Tf 72 720 Td ({line}) Tj ET"
        page = f"/Resources << /Font << /F1 3 0 R >> >> /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R"
        objects.append(f"<< /Type /Page /Parent 2 0 R {page} >>")
        objects.append(f"<< /Length {len(shown)} >>\nstream\n{shown}\nendstream")
    body, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    tail = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return (f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{tail}").encode("latin-1")


def test_pdf_and_word_files_give_their_text(tmp_path: Path) -> None:
    pytest.importorskip("pypdf", reason="needs the corpus extra")
    docx = pytest.importorskip("docx", reason="needs the corpus extra")
    path = tmp_path / "x.pdf"
    path.write_bytes(pdf_of(["First page", "Second page"]))
    assert gather(reader_named(reader_for(str(path)) or ""), path, [0, None])[0][1] == "First page\n\nSecond page"
    document = docx.Document()
    document.add_paragraph("One")
    document.add_table(1, 2).rows[0].cells[1].text = "cell"
    document.add_paragraph("Two")
    word = tmp_path / "x.docx"
    document.save(str(word))
    assert gather(reader_named(reader_for(str(word)) or ""), word, [0, None])[0][1] == "One\n\tcell\nTwo"
    for damaged in (path, word):
        damaged.write_bytes(damaged.read_bytes()[:200])
        found = gather(reader_named(reader_for(str(damaged)) or ""), damaged, [0, None])
        assert found[0][1] is None and "cannot be read" in found[0][2]


class Breaking:
    """A stream of ten rows that breaks at row 5 as often as ``left`` says."""

    def __init__(self, left: list[int], first: int = 0) -> None:
        self.left, self.first = left, first

    def shard(self, num_shards: int, index: int) -> Breaking:
        return self

    def skip(self, rows: int) -> Breaking:
        return Breaking(self.left, rows)

    def __iter__(self) -> Iterator[dict[str, str]]:
        for row in range(self.first, 10):
            if row == 5 and self.left[0]:
                self.left[0] -= 1
                raise ConnectionError("gone")
            yield {"text": f"row {row}"}


def test_a_stream_goes_on_where_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    path = hub.HubShard((), 0, 1).to_path()
    source = SourceSettings(name="s", hub="some/set")
    for breaks, fails in ((2, False), (3, True)):
        left = [breaks]
        monkeypatch.setattr(hub, "open_stream", lambda source, files, left=left: Breaking(left))
        rows = reader_named("hub").read(path, source, 0, None)
        if fails:
            with pytest.raises(UserError, match=r"some/set@0/1: broke at row 5 \(ConnectionError: gone\)"):
                list(rows)
        else:
            assert [text for part in rows for text in part.texts] == [f"row {row}" for row in range(10)]


def test_names_choose_readers(tmp_path: Path) -> None:
    kinds = {
        "a.JSONL.gz": "lines", "a.json": "lines", "a.parquet": "table", "a.md": "text", "a.rst": "text", "a.py": "text",
        "a.htm": "html", "a.html.zst": "html", "a.bin": None, "a": None,
        "doc/README": "text", "doc/copyright": "text",
    }  # fmt: skip
    assert {name: reader_for(name) for name in kinds} == kinds
    assert [reader_named("text").kind(name) for name in ("a.md", "a.py")] == ["text", "code"]
    binary = tmp_path / "x.txt"
    binary.write_bytes(b"\0\1\2")
    assert gather(reader_named("text"), binary, [0, None])[0][2] == "binary (it holds NUL bytes)"


def test_a_large_file_that_cannot_be_cut_is_named() -> None:
    def unit(name: str, size: int, places: int) -> Unit:
        return Unit(0, name, name, "lines", size, 0, places)

    small, whole = unit("a.jsonl", 1 << 20, 1 << 20), unit("b.jsonl.gz", 1 << 28, 0)
    assert "b.jsonl.gz: one partition, and more than half of the text" in whole_files([small, whole])[0]
    assert whole_files([small, unit("c.jsonl", 1 << 30, 1 << 30), whole]) == []
    assert whole_files([small, unit("b.jsonl.gz", 1 << 20, 0)]) == []


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_large_compressed_file_is_cut_into_few_pieces(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is much of the text; what each piece gives is what the whole file gives, though its size is a guess."""
    source = random.Random(8)
    texts = [f"{n} {source.getrandbits(4 * n % 900 + 4):x}" for n in range(900)]
    text = "".join(json.dumps({"text": one}) + "\n" for one in texts)
    pack = (lambda data: gzip.compress(data, 1)) if suffix == "gz" else zstandard.compress
    path, reader = tmp_path / f"a.jsonl.{suffix}", reader_named("lines")
    long = source.randbytes(2_000_000).hex()
    path.write_bytes(pack(long.encode()))
    with LineReader(path) as opened:
        assert 0.4 < opened.expected_size(sample=1 << 20) / len(long) < 2.5
    path.write_bytes(pack(text.encode()))
    assert reader.places(str(path), SOURCE) == 0, "too small to be worth it"
    monkeypatch.setattr(lines, "_WORTH_CUTTING", 1000)
    assert reader.places(str(path), SOURCE) == len(text)
    for places in (len(text), len(text) // 3, 3 * len(text)):
        whole = Unit(0, str(path), path.name, "lines", path.stat().st_size, 0, places)
        other = Unit(0, "b.jsonl", "b.jsonl", "lines", 40 * whole.bytes, 0, 40 * whole.bytes)
        partitions = sources.cut([whole], 20_000)
        assert 2 < len(partitions) <= 8 and partitions[-1][0].stop is None
        bounds = [0, *(pieces[0].stop for pieces in partitions)]
        assert gather(reader, path, bounds) == gather(reader, path, [0, None])
        assert len([pieces for pieces in sources.cut([whole, other], 20_000) if pieces[0].unit == 0]) == 1
