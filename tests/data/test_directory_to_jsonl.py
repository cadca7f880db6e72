"""Gathering files: what is read, in which order and encoding, what is skipped and why, and the held-out split."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megaforge.data.corpus.decode import NotText, decode
from megaforge.data.corpus.directory import DirectorySettings, Report, directory_to_jsonl, print_report
from megaforge.errors import UserError

pytest.importorskip("orjson", reason="needs the data extra")

FRENCH = "Le café était fermé à Noël, où les élèves déçus mangèrent des crêpes brûlées.\n" * 8
JAPANESE = "これは日本語の文章です。符号化の検出を試験します。\n" * 8
RUSSIAN = "Это русское предложение для проверки кодировки текста.\n" * 8


def gather(*inputs: Path, output: Path, **changes: Any) -> tuple[list[dict[str, str]], Report]:
    settings = DirectorySettings(tuple(map(str, inputs)), str(output), **changes)
    report = directory_to_jsonl(settings)
    return [json.loads(line) for line in output.read_bytes().splitlines()], report


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("héllo ≠ 漢字\n".encode(), "héllo ≠ 漢字\n"),
        (codecs.BOM_UTF8 + "é".encode(), "é"),
        (codecs.BOM_UTF16_LE + "é漢".encode("utf-16-le"), "é漢"),
        (codecs.BOM_UTF16_BE + "é漢".encode("utf-16-be"), "é漢"),
        (codecs.BOM_UTF32_LE + "é漢".encode("utf-32-le"), "é漢"),
        (b"# -*- coding: iso-8859-15 -*-\nprice = '\xa4'\n", "# -*- coding: iso-8859-15 -*-\nprice = '€'\n"),
        (b"one\r\ntwo\rthree\n", "one\ntwo\nthree\n"),
        (FRENCH.encode("latin-1"), FRENCH),
        (FRENCH.replace("é", "”").encode("cp1252"), FRENCH.replace("é", "”")),
        (JAPANESE.encode("shift_jis"), JAPANESE),
        (JAPANESE.encode("euc_jp"), JAPANESE),
        (RUSSIAN.encode("cp1251"), RUSSIAN),
        (RUSSIAN.encode("koi8-r"), RUSSIAN),
    ],
)
def test_encodings(data: bytes, text: str) -> None:
    pytest.importorskip("resiliparse", reason="needs the data extra")
    assert decode(data) == text


@pytest.mark.parametrize(
    "data",
    [
        b"\x7fELF\x02\x00\x00",
        bytes(range(1, 256)),
        b"# coding: klingon\n\xff",
        b"# coding: unicode_escape\n\\ud800 \xff",
    ],
)
def test_what_is_no_text(data: bytes) -> None:
    pytest.importorskip("resiliparse", reason="needs the data extra")
    with pytest.raises(NotText):
        decode(data)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, content in {
        "b.txt": "bee",
        "a/z.md": "# zed",
        "a/code.rs": "fn main() {}",
        "a.py": "print('a')",
        "README": "read me",
        "copy.txt": "bee",
        "empty.txt": " \n",
        "image.png": "not really",
        "binary.txt": "a\0b",
        "large.txt": "x" * 3000,
        "node_modules/lib.js": "excluded by default",
        "drafts/secret.txt": "excluded by flag",
        "one.json": '{"text": "from json", "meta": 1}',
        "many.json": '[{"text": "first"}, "second", {"body": 1}]',
        "broken.json": "{",
        "config.json": '{"a": 1}',
        "records.jsonl": '{"text": "r1"}\n{"no": 1}\n\nnot json\n{"text": "r5"}\n',
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "zipped.TXT.gz").write_bytes(gzip.compress(b"packed text"))
    (root / "lines.json").write_text('{"text": "l1"}\n{"text": "l2"}\n')
    (root / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    os.symlink(root / "b.txt", root / "link.txt")
    return root


def test_documents_come_in_the_order_of_their_names(tree: Path, tmp_path: Path) -> None:
    records, report = gather(tree, output=tmp_path / "o.jsonl", exclude=("drafts",), max_file_mb=0.002)
    assert [(record["source"].removeprefix("tree/"), record["text"]) for record in records] == [
        ("README", "read me"),
        ("a.py", "print('a')"),
        ("b.txt", "bee"),
        ("lines.json:1", "l1"),
        ("lines.json:2", "l2"),
        ("many.json:0", "first"),
        ("many.json:1", "second"),
        ("more.jsonl.gz:1", "packed"),
        ("one.json", "from json"),
        ("records.jsonl:1", "r1"),
        ("records.jsonl:5", "r5"),
        ("zipped.TXT.gz", "packed text"),
        ("a/code.rs", "fn main() {}"),
        ("a/z.md", "# zed"),
    ]
    reasons = {name.removeprefix("tree/"): reason for name, reason in report.left_out.entries}
    for name, reason in {
        "copy.txt": "same text",
        "empty.txt": "empty",
        "image.png": "(.png)",
        "binary.txt": "NUL",
        "large.txt": "--max-file-mb 0.002",
        "link.txt": "symbolic link",
        "node_modules": "excluded by its name",
        "drafts": "excluded by its name",
        "many.json": "(1 of its records)",
        "broken.json": "not valid JSON",
        "config.json": "no string under the key 'text'",
        "records.jsonl, line 2": "no key 'text'",
        "records.jsonl, line 4": "not valid JSON",
    }.items():
        assert reason in reasons.pop(name), name
    assert not reasons


def test_the_place_of_the_tree_does_not_matter(tree: Path, tmp_path: Path) -> None:
    first, _ = gather(tree, output=tmp_path / "1.jsonl")
    shutil.copytree(tree, tmp_path / "elsewhere" / "tree", symlinks=True)
    second, _ = gather(tmp_path / "elsewhere" / "tree", output=tmp_path / "2.jsonl")
    assert first == second
    again, _ = gather(tree, output=tree / "inside.jsonl")
    again, _ = gather(tree, output=tree / "inside.jsonl")
    assert again == first  # the output of an earlier run is no input


def test_the_held_out_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    root = tmp_path / "t"
    root.mkdir()
    for number in range(400):
        (root / f"{number}.txt").write_text(f"document {number}")
    held = tmp_path / "held.jsonl"
    options: dict[str, Any] = {"holdout_fraction": 0.1, "holdout_output": str(held)}
    train, report = gather(root, output=tmp_path / "train.jsonl", **options)
    out = {json.loads(line)["text"] for line in held.read_bytes().splitlines()}
    assert report.documents == [len(train), len(out)] and 20 < len(out) < 65
    assert out.isdisjoint(record["text"] for record in train) and len(out) + len(train) == 400

    for number in range(0, 400, 2):
        (root / f"{number}.txt").rename(root / f"renamed{number}.md")
    (root / "new.txt").write_text("another document")
    gather(root, output=tmp_path / "train.jsonl", force=True, **options)
    assert out - {"another document"} == {json.loads(line)["text"] for line in held.read_bytes().splitlines()} - {
        "another document"
    }


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_output_is_read_back_and_reproducible(suffix: str, tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="needs the data extra")
    from megaforge.data.jsonl import LineReader

    plain, _ = gather(tree, output=tmp_path / "o.jsonl")
    output = tmp_path / f"o.jsonl{suffix}"
    contents = []
    for _ in range(2):
        directory_to_jsonl(DirectorySettings((str(tree),), str(output)))
        contents.append(output.read_bytes())
    assert contents[0] == contents[1]
    with LineReader(output) as reader:
        assert [json.loads(line) for lines in reader.chunks(None) for line in lines] == plain


def test_python_stdlib_and_its_documentation(tmp_path: Path) -> None:
    held = tmp_path / "h.jsonl"
    records, report = gather(
        output=tmp_path / "o.jsonl", python_stdlib=True, holdout_fraction=0.05, holdout_output=str(held)
    )
    sources = [record["source"] for record in records] + [json.loads(line)["source"] for line in held.open()]
    assert sum(report.text_bytes) > 5e6 and report.documents[1] > 10
    assert any(source.endswith("/argparse.py") for source in sources)
    assert "pydoc:assignment" in sources
    assert not any("/test/" in source or "site-packages" in source for source in sources)
    first = (tmp_path / "o.jsonl").read_bytes(), held.read_bytes()
    gather(output=tmp_path / "o.jsonl", python_stdlib=True, holdout_fraction=0.05, holdout_output=str(held))
    assert first == ((tmp_path / "o.jsonl").read_bytes(), held.read_bytes())


def test_what_cannot_work_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    (tmp_path / "none").mkdir()
    (tree / "image.png").write_bytes(b"\x89PNG\0")
    cases: list[tuple[tuple[Path, ...], dict[str, Any], str]] = [
        ((), {}, "--input is missing"),
        ((tmp_path / "missing",), {}, "missing does not exist"),
        ((tree,), {"holdout_fraction": 0.1}, "--holdout-output"),
        ((tree,), {"holdout_fraction": 1.5, "holdout_output": "h"}, "--holdout-fraction 1.5"),
        ((tmp_path / "none",), {}, "no document"),
        ((tree / "image.png",), {}, "binary"),
        ((tree,), {"split_documents": "<|end|>"}, "no text holds this marker"),
        ((tree,), {"split_documents": " "}, "--split-documents ' '"),
        ((tree,), {"split_documents": "size", "document_size": 0}, "--document-size 0"),
        ((tree,), {"holdout_fraction": 1e-9, "holdout_output": str(tmp_path / "h")}, "none of .* documents fell"),
        ((tree,), {"holdout_fraction": 0.1, "holdout_output": str(output)}, "another file than --output"),
    ]
    for inputs, changes, message in cases:
        with pytest.raises(UserError, match=message):
            gather(*inputs, output=output, **changes)
    with pytest.raises(UserError, match="--output .* cannot be made"):
        gather(tree, output=tree / "b.txt" / "o.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none", "tree"]


def test_links_are_read_once_and_what_is_not_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = tmp_path / "in", tmp_path / "out"
    for name in ("in/a/1.txt", "in/shut/2.txt", "out/books/3.txt", "out/books/deep/4.txt", "out/file.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, target in {
        "in/books": outside / "books",
        "in/link.txt": outside / "file.txt",
        "in/again": root / "a",
        "in/gone": tmp_path / "nothing",
        "in/up": tmp_path,
        "out/books/deep/loop": outside / "books",
    }.items():
        os.symlink(target, tmp_path / link)
    os.mkfifo(root / "pipe.txt")
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("named in Latin-1")
    listdir = os.listdir

    def guarded(path: Any) -> list[str]:
        if str(path).endswith("/shut"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", guarded)
    records, report = gather(root, output=tmp_path / "o.jsonl")
    assert {record["source"]: record["text"] for record in records} == {
        "in/caf\\xe9.txt": "named in Latin-1",
        "in/link.txt": "out/file.txt",
        "in/a/1.txt": "in/a/1.txt",
        "in/books/3.txt": "out/books/3.txt",
        "in/books/deep/4.txt": "out/books/deep/4.txt",
    }
    reasons = dict(report.left_out.entries)
    for name, reason in {
        "in/again": "into the same directory",
        "in/gone": "to nothing",
        "in/up": "holds this one",
        "in/books/deep/loop": "under another name",
        "in/pipe.txt": "neither a file nor a directory",
        "in/shut": "Permission denied",
    }.items():
        assert reason in reasons.pop(name), name
    assert not reasons


def test_what_is_left_out_is_a_line_a_reason_and_a_list_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, output = tmp_path / "t", tmp_path / "new" / "o.jsonl"
    root.mkdir()
    (root / "a.txt").write_text("text")
    for number in range(500):
        (root / f"{number}.png").touch()
        (root / f"{number}.txt").touch()
    (root / "r.jsonl").write_text("\n" + "{]\n" * 499 + '{"no": 1}\n')
    settings = DirectorySettings((str(root),), str(output))
    print_report(directory_to_jsonl(settings), settings)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert "left out 500: no text or source file by its name; for example t/0.png (.png)" in lines
    assert "left out 500: empty; for example t/0.txt" in lines
    assert any(line.startswith("left out 499: not valid JSON; for example t/r.jsonl, line 2 (") for line in lines)
    listed = Path(f"{output}.skipped.tsv").read_text().splitlines()
    assert len(listed) == 1500 and "t/499.txt\tempty" in listed

    for path in root.glob("*"):
        if path.name != "a.txt":
            path.unlink()
    print_report(directory_to_jsonl(settings), settings)
    assert not Path(f"{output}.skipped.tsv").exists(), "nothing is left out any more"


@pytest.mark.parametrize(
    ("how", "size", "text", "parts"),
    [
        ("blank-lines", 9, "a\nb\n\n\nc\n \t\nd\n\n", ["a\nb", "c", "d"]),
        ("size", 10, "one two three four", ["one two ", "three four"]),
        ("size", 8, "aaaaa\n\nbb cc\ndd", ["aaaaa\n\n", "bb cc\ndd"]),
        ("size", 4, "abcdefghij", ["abcd", "efgh", "ij"]),
        ("size", 1, "abc", ["a", "b", "c"]),
        ("<|end|>", 9, "a\n<|end|>\nb<|end|><|end|>c", ["a", "b", "c"]),
    ],
)
def test_a_text_becomes_many_documents(how: str, size: int, text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "book.dat"
    path.write_text(text)
    records, _ = gather(path, output=tmp_path / "o.jsonl", split_documents=how, document_size=size)
    assert [record["text"] for record in records] == parts
    assert records[0]["source"] == "book.dat:1"


def test_three_files_can_be_held_out_from(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c")]
    for number, path in enumerate(paths):
        path.write_text("\n\n".join(f"paragraph {n} of {number}" for n in range(100)))
    held = tmp_path / "h.jsonl"
    records, report = gather(
        *paths,
        output=tmp_path / "o.jsonl",
        split_documents="blank-lines",
        holdout_fraction=0.1,
        holdout_output=str(held),
        max_file_mb=1e-9,
    )
    assert len(records) + report.documents[1] == 300 and report.documents[1] > 10


def test_another_result_is_not_replaced(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    first, _ = gather(tree, output=output)
    assert gather(tree, output=output)[0] == first, "the same again is no conflict"
    (tree / "new.txt").write_text("another document")
    before = output.read_bytes()
    with pytest.raises(UserError, match=f"--output {output} exists.*--force"):
        gather(tree, output=output)
    assert output.read_bytes() == before and not list(tmp_path.glob("*.tmp-*"))
    assert len(gather(tree, output=output, force=True)[0]) == len(first) + 1
