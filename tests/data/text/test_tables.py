"""Parquet and Arrow: rows from any place on, columns that are no text, directories of data sets."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megaforge.data.text.expand import expand_inputs
from megaforge.data.text.formats import TextFormat, text_format
from megaforge.data.text.readers import open_text, read_texts
from megaforge.errors import UserError

arrow = pytest.importorskip("pyarrow", reason="needs the parquet extra")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document {number} é" * (number % 5) for number in range(2500)]


def write(path: Path, texts: list[str | None], **columns: list[object]) -> Path:
    """A table of the texts, as the suffix says; ``.arrow`` is a stream, as datasets writes it."""
    table = arrow.table({"id": list(range(len(texts))), "text": texts, **columns})
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=700)
    elif path.suffix == ".arrow":
        with arrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    else:
        with arrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_any_cut_gives_every_row_once(name: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / name, TEXTS))
    assert text_format(path).is_table
    assert list(read_texts(path, "text")) == TEXTS
    source = random.Random(0)
    for _ in range(5):
        cuts = [0, *sorted(source.randint(0, len(TEXTS)) for _ in range(4)), 700, 1400]
        cuts.sort()
        with open_text(path, "text") as reader:
            read = []
            for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
                reader.goto(start)
                read += [text for chunk in reader.chunks(stop) for text in chunk.texts]
            assert read == TEXTS and reader.at_end()


def test_rows_without_text_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["a", None, "c"])
    with pytest.raises(UserError, match=rf"--input {path}, row 2: 'text' is not a string \(None\)"):
        list(read_texts(str(path), "text"))


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.parquet", ["a"]))
    with pytest.raises(UserError, match="no column 'body' .--json-key.; there are id, text"):
        open_text(path, "body")
    with pytest.raises(UserError, match="'id' holds int64, not text"):
        open_text(path, "id")
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 and then nothing")
        with pytest.raises(UserError, match=f"{name}: damaged, or not "):
            open_text(str(tmp_path / name), "text")


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write(tmp_path / "a.parquet", ["a"]))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert text_format(path) is TextFormat.PARQUET
    with pytest.raises(UserError, match=r"megaforge\[parquet\]"):
        open_text(path, "text")


def test_directories_of_data_sets(tmp_path: Path) -> None:
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for name in names:
        write(saved / name, [name])
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (saved.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for given in (saved, saved.parent):
        assert [t for file in expand_inputs([str(given)]) for t in read_texts(file, "text")] == names
    (saved.parent / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="holds the splits train, test; give one, such as .*/train"):
        expand_inputs([str(saved.parent)])

    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for name in ("train-00001-of-00002.parquet", "train-00000-of-00002.parquet"):
        write(hub / name, [name])
    plain = str(tmp_path / "c.jsonl")
    assert expand_inputs([str(hub.parent), plain]) == (*map(str, sorted(hub.iterdir())), plain)
    write(hub / "test-00000-of-00001.parquet", ["t"])
    with pytest.raises(UserError, match="several splits .test, train."):
        expand_inputs([str(hub.parent)])
