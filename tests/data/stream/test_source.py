"""Text read as it comes: the same token stream as a dataset of it, for any layout, and from a checkpoint on."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.cli import parse_config
from megaforge.data.data_source import source_kind
from megaforge.data.loader import GlobalBatchLoader
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.data.stream.documents import Documents
from megaforge.data.stream.files import stream_names
from megaforge.errors import UserError
from tests.data.datasets import random_documents, write_dataset

pytest.importorskip("orjson", reason="needs the data extra")
EOD = 1000
TOKENIZER = ("--tokenizer-type", "NullTokenizer", "--tokenizer-model", str(EOD))


def write_texts(folder: Path, documents: list[list[int]], files: int = 3) -> str:
    """The documents' numbers as text, in files of several kinds; the glob of them."""
    folder.mkdir()
    for number in range(files):
        own = documents[number * len(documents) // files : (number + 1) * len(documents) // files]
        lines = "".join(json.dumps({"text": " ".join(map(str, ids))}) + "\n" for ids in own).encode()
        name = folder / f"part{number}.jsonl{'.gz' * (number % 2)}"
        name.write_bytes(gzip.compress(lines, mtime=0) if number % 2 else lines)
    return f"stream:{folder}/*.jsonl*"


def opened(*flags: str, path: str | tuple[str, ...]) -> Any:
    paths = (path,) if isinstance(path, str) else path
    config = parse_config(["--data-path", *paths, "--seq-length", "16", "--split", "1", *flags]).config
    source_kind(config.data).check(config)
    config, tokenizer, _ = with_run_tokenizer(config)
    return source_kind(config.data).open(config, tokenizer)


def sample(data: Any, k: int, ahead: int = 1) -> tuple[list[int], list[bool]]:
    length = data.sequence_length(k) + ahead
    tokens, marks = np.empty(length, np.int64), np.zeros(length, np.bool_)
    assert data.fill(k, tokens, marks) == length - 1
    return tokens.tolist(), marks.tolist()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_text_and_dataset_are_one_token_stream(tmp_path: Path, size: int) -> None:
    """Three epochs, empty documents among them, in any order of asking, with four tokens to look ahead."""
    documents = random_documents(3, 100, 12, EOD)
    stream = write_texts(tmp_path / "text", documents)
    dataset = write_dataset(tmp_path / "d", [[*ids, EOD] if ids else [] for ids in documents])
    order = ("--stream-round", str(size))
    text = opened(*TOKENIZER, *order, path=stream)
    data = opened("--data-order", "streamed", *order, path=dataset)
    asked = list(range(3 * sum(data.epoch_tokens) // 16))
    random.Random(size).shuffle(asked)
    for k in [*asked[:60], *range(9)]:
        assert sample(text, k, 4) == sample(data, k, 4)
    other = opened("--seed", "7", "--data-order", "streamed", *order, path=dataset)
    assert size == 1 or sample(other, 0) != sample(data, 0)
    whole = [token for k in range(sum(data.epoch_tokens) // 16 + 1) for token in sample(text, k)[0][:16]]
    assert sorted(whole[: sum(data.epoch_tokens)]) == sorted(
        t for ids in documents for t in [*ids, *([EOD] * bool(ids))]
    )
    data.check_state(data.state(5))
    for size in (("--stream-round", "9999"), ()):
        with pytest.raises(UserError, match="the documents of a round .--data-order streamed, --stream-round. was"):
            opened("--data-order", "streamed" if size else "shuffled", *size, path=dataset).check_state(data.state(5))


def digests(data: Any, dp: int, workers: int, first: int, count: int) -> list[str]:
    """SHA-256 of each global batch of 8, put together from all ranks."""
    loaders = [GlobalBatchLoader(data, BatchSchedule(8), 2, rank, dp, first, workers) for rank in range(dp)]
    found = []
    for ranks in itertools.islice(zip(*loaders, strict=True), count):
        whole = hashlib.sha256()
        for micro_batches in zip(*ranks, strict=True):
            for batch in micro_batches:
                whole.update(batch.tokens.numpy().tobytes() + batch.document_start.numpy().tobytes())
        found.append(whole.hexdigest())
    return found


def test_killed_and_resumed_at_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples at any dp, with threads or without; and what a checkpoint read is not read again."""
    streams = tuple(write_texts(tmp_path / name, random_documents(n, 300, 20, EOD)) for n, name in enumerate("ab"))
    paths = ("0.7", streams[0], "0.3", streams[1])
    flags = (*TOKENIZER, "--stream-round", "16")
    reference = digests(opened(*flags, path=paths), 1, 0, 0, 60)
    assert len(set(reference)) == 60
    for dp, workers in ((2, 2), (4, 1)):
        assert digests(opened(*flags, path=paths), dp, workers, 0, 60) == reference
    data = opened(*flags, path=paths)
    digests(data, 1, 2, 0, 41)
    saved = json.loads(json.dumps(data.state(37 * 8)))
    assert all(mark["cursor"] > 0 for mark in saved["marks"])
    read: list[int] = []
    round_at = Documents.round_at

    def counted(self: Documents, mark: Any) -> Any:
        read.append(mark.cursor)
        return round_at(self, mark)

    monkeypatch.setattr(Documents, "round_at", counted)
    resumed = opened(*flags, path=paths)
    resumed.check_state(saved)
    assert digests(resumed, 2, 1, 37 * 8, 23) == reference[37:]
    assert min(read) == min(mark["cursor"] for mark in saved["marks"])
    assert digests(resumed, 1, 0, 0, 2) == reference[:2], "and what came before can be asked for"


def test_a_schedule_weighs_streams(tmp_path: Path) -> None:
    streams = tuple(write_texts(tmp_path / name, random_documents(n, 60, 20, EOD)) for n, name in enumerate("ab"))
    file = tmp_path / "own.yaml"
    named = ", ".join(f"'{name}': {{domain: {domain}}}" for name, domain in zip(streams, ("web", "code"), strict=True))
    file.write_text(f"sources: {{{named}}}\nmax_epochs: 1\ndomains: {{web: 3, code: 1}}\n")
    data = opened(*TOKENIZER, "--data-schedule", str(file), path=streams)
    assert [data.domain(k) for k in range(8)].count("web") == 6 and data.end is None
    assert "max_epochs is not heeded" in data.notices[2]


def test_files_that_changed(tmp_path: Path) -> None:
    stream = write_texts(tmp_path / "text", random_documents(3, 60, 12, EOD))
    saved = opened(*TOKENIZER, path=stream).state(8)
    first, second = tmp_path / "text" / "part0.jsonl", tmp_path / "text" / "part1.jsonl.gz"
    content = first.read_bytes()
    for change, complaint in (
        (lambda: first.write_bytes(content.replace(b"1", b"2", 1)), "part0.jsonl has changed since the checkpoint"),
        (lambda: first.unlink(), "file 1 was .*part0.jsonl and is now .*part1.jsonl.gz since"),
        (lambda: (tmp_path / "text" / "z.jsonl").write_bytes(content), "z.jsonl is new since"),
        (lambda: (tmp_path / "text" / "part2.jsonl").unlink(), "part2.jsonl is gone since"),
    ):
        change()
        with pytest.raises(UserError, match=complaint):
            opened(*TOKENIZER, path=stream).check_state(saved)
        first.write_bytes(content)
        (tmp_path / "text" / "z.jsonl").unlink(missing_ok=True)
    assert second.exists()


def test_evaluations_need_datasets(tmp_path: Path) -> None:
    stream = write_texts(tmp_path / "text", random_documents(3, 60, 12, EOD))
    data = opened(*TOKENIZER, path=stream)
    assert "3 files, tokenised as they are read" in data.notices[0] and data.bytes_per_token() is None
    with pytest.raises(UserError, match="a stream holds no 'valid' documents out; name datasets for them: --train"):
        data.validation()
    held_out = write_dataset(tmp_path / "v", [[1, 2, 3, 4]] * 5)
    config = parse_config(
        ["--train-data-path", stream, "--valid-data-path", held_out, *TOKENIZER, "--eval-iters", "1"]
    ).config
    config, tokenizer, _ = with_run_tokenizer(config)
    assert len(source_kind(config.data).open(config, tokenizer).validation("valid")) == 1  # type: ignore[arg-type]


def test_names(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.txt", "deep/c.md", "d.dat"):
        (folder / name).write_text("{}\n")
    listed = tmp_path / "files.txt"
    listed.write_text(f"{folder}/b.jsonl\n\nhttp://h/p-{{08..10}}.gz\n")
    for spec, names in (
        (f"stream:{folder}", ["a.txt", "b.jsonl", "deep/c.md"]),
        (f"stream:{folder}/**/*.md", ["deep/c.md"]),
        (f"stream:{folder}/d.dat", ["d.dat"]),
    ):
        assert stream_names(spec) == [f"{folder}/{name}" for name in names]
    assert stream_names(f"stream:@{listed}")[1:] == [f"http://h/p-{n}.gz" for n in ("08", "09", "10")]
    (folder / "d.dat").write_bytes(b"MMIDIDX\0")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the parquet extra")
    parquet.write_table(pytest.importorskip("pyarrow").table({"body": ["1"]}), folder / "t.parquet")
    for paths, flags, complaint in (
        ((f"stream:{folder}/*.x",), TOKENIZER, "there is no such file"),
        (("stream:@none",), TOKENIZER, "none cannot be read .No such file"),
        ((f"stream:{folder}/a.txt",), (), "text needs a tokenizer: add --tokenizer-model"),
        ((f"stream:{folder}/d.dat",), TOKENIZER, "half of a dataset of tokens"),
        ((f"stream:{folder}/t.parquet",), TOKENIZER, "t.parquet: no column 'text' .--json-key.; there are body"),
        ((f"stream:{folder}/a.txt", str(folder / "x")), TOKENIZER, "x is a dataset and others are text"),
        (("stream:http://h/a.gz",), TOKENIZER, "needs a place for its copy: add --data-cache-dir DIR"),
    ):
        with pytest.raises(UserError, match=f"--data-path .*{complaint}"):
            opened(*flags, path=paths)


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` lists the files of a set; it is not here, so something with its face is."""

    class Hub:
        @staticmethod
        def load_dataset_builder(name: str, config: str | None) -> Any:
            if name != "org/set":
                raise OSError("Couldn't reach it")
            files = {"train": [f"hf://datasets/{name}/{config}.jsonl"], "test": ["t.jsonl"]}
            return SimpleNamespace(config=SimpleNamespace(data_files=files))

    monkeypatch.setitem(sys.modules, "datasets", Hub)  # type: ignore[arg-type]
    assert stream_names("stream:hf:org/set") == ["hf://datasets/org/set/None.jsonl"]
    assert stream_names("stream:hf:org/set:en:test") == ["t.jsonl"]
    for name, complaint in (
        ("org/none", "'datasets' cannot list its files"),
        ("org/set:en:dev", "there is no such file"),
    ):
        with pytest.raises(UserError, match=f"--data-path stream:hf:{name}: {complaint}"):
            stream_names(f"stream:hf:{name}")
