"""One reader for all tools: formats by name and content, marks, compression, and one message for each bad record."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import pytest

from megaforge.data.text.formats import TextFormat, text_format
from megaforge.data.text.readers import input_size, open_text, read_texts
from megaforge.errors import UserError

pytest.importorskip("orjson", reason="needs the data extra")
zstandard = pytest.importorskip("zstandard", reason="needs the data extra")

TEXTS = ["the cat", "a café\nof two lines", "", "{braces}"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
LONG_WINDOW = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)


def long_zstd(content: bytes) -> bytes:
    """What ``zstd --long=31`` writes of a pipe."""
    compressor = zstandard.ZstdCompressor(compression_params=LONG_WINDOW).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"a{suffix}", LINES) for suffix in (".jsonl", ".json", ".ndjson", ".JSONL", ".dat", "")),
        *((f"a{suffix}", gzip.compress(LINES, mtime=0)) for suffix in (".jsonl.gz", ".JSON.GZ", ".jsonl", ".dat")),
        *((f"a{suffix}", zstandard.compress(LINES)) for suffix in (".ndjson.zst", ".NDJSON.ZST", ".dat")),
        ("long.jsonl.zst", long_zstd(LINES)),
        ("mark.jsonl", codecs.BOM_UTF8 + LINES),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("blank.jsonl", b"\n\r\n" + LINES.replace(b"\n", b"\n \n") + b"\n"),
        ("unfinished.jsonl", LINES.removesuffix(b"\n")),
    ],
)
def test_the_same_lines_under_many_names(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert text_format(str(path)) is TextFormat.LINES
    assert list(read_texts(str(path), "text")) == TEXTS
    assert input_size(str(path), "text") >= len(LINES) - 1


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"one\n\ntwo", "one\n\ntwo"),
        ("A.TXT", b"one", "one"),
        ("a.md.gz", gzip.compress(b"# one", mtime=0), "# one"),
        ("mark.txt", codecs.BOM_UTF8 + b"one", "one"),
        ("wide.rst", codecs.BOM_UTF16_LE + "é".encode("utf-16-le"), "é"),
        ("crlf.txt", b"one\r\ntwo\r\n", "one\ntwo\n"),
        ("script", b"#!/bin/sh\n{ echo; }\n", "#!/bin/sh\n{ echo; }\n"),
        ("braces.dat", b"{not json}\n", "{not json}\n"),
        ("object.txt", b'{"a": 1} is JSON\n', '{"a": 1} is JSON\n'),
    ],
)
def test_a_text_is_one_document(name: str, content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert text_format(str(path)) is TextFormat.TEXT
    assert list(read_texts(str(path), "text")) == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"},\n {"text": "b"}]', "JSON array.*directory_to_jsonl"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}]\n', "JSON array.*directory_to_jsonl"),
        ("a.json", b'{\n "text": "a"\n}\n', "several lines.*directory_to_jsonl"),
        ("a.jsonl", codecs.BOM_UTF16_LE + LINES.decode().encode("utf-16-le"), "UTF-16"),
        ("a.txt", LINES, "name it .jsonl"),
        ("a.dat", b"\x7fELF\0\0\0", "binary"),
        ("a.txt", b"a\0b", "NUL"),
        ("a.jsonl.bz2", b"BZh9", ".bz2 is not read"),
        ("a.bin", b"\1\0", "dataset of tokens"),
        ("a.idx", b"MMIDIDX\0\0", "dataset of tokens"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "cut \\ud83d here"}\n', "line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: the record has no key 'text' .--json-key"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"line 2: 'text' is not a string \(3\)"),
        ("a.jsonl", b'{"text": "a"}\n"text"\n', "line 2: the line is JSON but no object"),
        ("a.jsonl.zst", long_zstd(LINES)[:-9], "damaged or cut short"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"--input {path}.*{message}"):
        list(read_texts(str(path), "text"))


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input .*none.jsonl: No such file"):
        open_text(str(tmp_path / "none.jsonl"), "text")
    with pytest.raises(UserError, match="is a directory"):
        open_text(str(tmp_path), "text")


def test_each_text_knows_its_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "b"}\n{"no": 1}\n\n{"text": "e"}\n')
    with open_text(str(path), "text") as reader:
        (chunk,) = reader.chunks(None)
    assert (chunk.texts, chunk.numbers, chunk.records) == (["b", "e"], [1, 4], 5)


def test_a_window_that_does_not_fit_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaforge.data.jsonl._LARGEST_WINDOW", 27)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(long_zstd(LINES))
    with pytest.raises(UserError, match="window of 2,147,483,648 bytes"):
        list(read_texts(str(path), "text"))
