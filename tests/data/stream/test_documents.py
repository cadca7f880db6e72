"""Documents in rounds, against a list; from any mark on."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from megaforge.data.jsonl import LineReader
from megaforge.data.stream.documents import Documents, Mark
from megaforge.errors import UserError


def write(path: Path, texts: list[str], *, bad: str | None = None) -> str:
    lines = [json.dumps({"text": text}) for text in texts]
    if bad is not None:
        lines.insert(1, bad)
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a file."""
    chunks = LineReader.chunks
    monkeypatch.setattr(LineReader, "chunks", lambda self, stop, hint=60: chunks(self, stop, hint))


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_rounds(tmp_path: Path, small_chunks: None, size: int) -> None:
    texts = [[f"{name} {number}" for number in range(count)] for name, count in (("a", 11), ("b", 0), ("c", 6))]
    names = [
        write(tmp_path / name, part) for name, part in zip(("a.jsonl", "b.jsonl", "c.jsonl.gz"), texts, strict=True)
    ]
    (tmp_path / "d.txt").write_text("the last one\n")
    whole = [*texts[0], *texts[2], "the last one\n"]
    expected = [whole[first : first + size] for first in range(0, len(whole), size)]
    if not len(whole) % size:
        expected.append([])  # the end shows only behind it
    documents = Documents([*names, str(tmp_path / "d.txt")], "text", size, False)
    marks, read, mark = [], [], Mark()
    while mark.epoch < 2:
        marks.append(mark)
        found, mark = documents.round_at(mark)
        read.append(found)
    assert read == expected * 2 and mark == Mark(0, 2)
    places = list(range(len(marks)))
    random.Random(size).shuffle(places)
    for place in places:  # in any order
        assert documents.round_at(Mark.from_json(marks[place].to_json()))[0] == read[place]
    documents.close()


def test_bad_records(tmp_path: Path) -> None:
    good, bad = (
        write(tmp_path / "a.jsonl", ["x"] * 4),
        write(tmp_path / "b.jsonl", ["y", "z"], bad='{"body": 1}'),
    )
    with pytest.raises(UserError, match="b.jsonl, line 2: the record has no key 'text' .*--stream-on-error skip"):
        Documents([good, bad], "text", 9, False).round_at(Mark())
    documents = Documents([good, bad], "text", 9, True)
    assert documents.round_at(Mark())[0] == ["x"] * 4 + ["y", "z"]
    assert documents.bad == {"the record has no key 'text'": 1}
    with pytest.raises(UserError, match="there is no document in the files"):
        Documents([write(tmp_path / "none.jsonl", [])], "text", 2, False).round_at(Mark())
    (tmp_path / "cut.jsonl.gz").write_bytes(Path(write(tmp_path / "c.jsonl.gz", ["q" * 99] * 50)).read_bytes()[:60])
    with pytest.raises(UserError, match="--data-path stream: .*cut.jsonl.gz"):
        Documents([str(tmp_path / "cut.jsonl.gz")], "text", 99, False).round_at(Mark())


def test_a_file_that_fails_for_a_moment(tmp_path: Path) -> None:
    """What failed is read again from where it began."""
    names = [write(tmp_path / f"{name}.jsonl", [name, name * 2]) for name in "ab"]
    broken = [True]

    def local(number: int, name: str) -> str:
        if number == 1 and broken:
            broken.clear()
            raise OSError(5, "Input/output error")
        return name

    documents = Documents(names, "text", 3, False, local)
    with pytest.raises(OSError, match="Input/output"):
        documents.round_at(Mark())
    assert documents.round_at(Mark())[0] == ["a", "aa", "b"]
