"""The indexed format: its bytes, a second reader, merging, damage and atomic publication."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaforge.data import indexed_dataset
from megaforge.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, merge_shards, optimal_dtype
from megaforge.errors import UserError
from tests.data.datasets import random_documents, second_reader, write_dataset
from tests.disk_log import disk_log

GOLDEN_BIN = "0100 0200 0300 ff00 ffff"
GOLDEN_IDX = (
    "4d4d49444944580000"  # MMIDIDX, two zero bytes
    "0100000000000000"  # version
    "08"  # uint16
    "0200000000000000"  # sequences
    "0400000000000000"  # documents + 1
    "03000000 02000000"  # lengths
    "0000000000000000 0600000000000000"  # pointers
    "0000000000000000 0100000000000000 0100000000000000 0200000000000000"  # documents: the second one is empty
)


def test_golden_bytes(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2, 3], [], [255, 65535]])
    assert Path(f"{prefix}.bin").read_bytes() == bytes.fromhex(GOLDEN_BIN)
    assert Path(f"{prefix}.idx").read_bytes() == bytes.fromhex(GOLDEN_IDX)
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 127), max_size=9), max_size=12),
    dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "int64", "uint16"]),
    chunk=st.integers(1, 5),
)
def test_second_reader_agrees(documents: list[list[int]], dtype: str, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_dataset, "_CHUNK", chunk)
        prefix = write_dataset(Path(folder) / "d", documents, dtype)
        data = IndexedDataset(prefix)
        assert second_reader(prefix) == [[document] if document else [] for document in documents]
        assert [data.read(i).tolist() for i in range(len(data))] == [d for d in documents if d]
        assert (data.num_documents, data.num_tokens) == (len(documents), sum(map(len, documents)))
        starts, lengths = data.document_extents()
        extents = zip(starts, lengths, strict=True)
        assert [data.tokens[start : start + length].tolist() for start, length in extents] == documents
        assert data.dtype == np.dtype(dtype)


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.lists(st.lists(st.integers(0, 999), max_size=6), max_size=7), min_size=1, max_size=4),
    chunk=st.integers(1, 4),
)
def test_merged_shards_are_what_one_writer_writes(shards: list[list[list[int]]], chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_dataset, "_CHUNK", chunk)
        root = Path(folder)
        prefixes = [write_dataset(root / f"s{i}", shard) for i, shard in enumerate(shards)]
        whole = write_dataset(root / "whole", [document for shard in shards for document in shard])
        merge_shards(prefixes, root / "merged")
        for suffix in (".bin", ".idx"):
            assert Path(f"{root}/merged{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()


def write_by_hand(prefix: Path, sequences: list[list[int]], documents: list[int], modes: bytes = b"") -> str:
    lengths = [len(sequence) for sequence in sequences]
    pointers = [4 * sum(lengths[:i]) for i in range(len(lengths))]
    prefix.with_suffix(".bin").write_bytes(b"".join(struct.pack(f"<{len(s)}i", *s) for s in sequences))
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 4, len(sequences), len(documents))
        + struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(documents)}q", *lengths, *pointers, *documents)
        + modes
    )
    return str(prefix)


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    one = write_by_hand(tmp_path / "one", [[1, 2], [3], [4, 5, 6]], [0, 2, 2, 3], modes=b"\0\0\0")
    data = IndexedDataset(one)
    assert data.document_extents()[0].tolist() == [0, 3, 3]
    assert data.document_extents()[1].tolist() == [3, 0, 3]
    assert data.read(2, 1).tolist() == [5, 6] and data.read(2, 1, 1).tolist() == [5]
    two = write_by_hand(tmp_path / "two", [[7], [8, 9]], [0, 2])
    merge_shards([one, two], tmp_path / "both")
    assert second_reader(str(tmp_path / "both")) == [[[1, 2], [3]], [], [[4, 5, 6]], [[7], [8, 9]]]


def test_read_is_a_view_within_bounds(tmp_path: Path) -> None:
    data = IndexedDataset(write_dataset(tmp_path / "d", [[1, 2, 3], [4]]))
    assert np.shares_memory(data.read(0), data.tokens) and not data.read(0).flags.writeable
    for arguments in [(0, 4), (0, 0, 4), (0, -1), (2,)]:
        with pytest.raises(IndexError):
            data.read(*arguments)


def test_vectorised_writing_equals_one_by_one(tmp_path: Path) -> None:
    documents = random_documents(3, 50, 9)
    one = write_dataset(tmp_path / "one", documents)
    with IndexedDatasetWriter(tmp_path / "many", "uint16") as writer:
        for part in (documents[:20], documents[20:]):
            writer.add_documents(np.array([t for d in part for t in d]), [len(d) for d in part])
        assert (writer.documents, writer.tokens) == (50, sum(map(len, documents)))
    assert second_reader(one) == second_reader(str(tmp_path / "many"))


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for tokens in ([70000], [-1]):
        with pytest.raises(UserError, match=f"{tokens[0]}.*do not fit.*uint16"):
            write_dataset(tmp_path / "d", [tokens])
    assert os.listdir(tmp_path) == []


def test_optimal_dtype_is_megatrons() -> None:
    assert optimal_dtype(65499) == np.uint16 and optimal_dtype(65500) == np.int32


def damage(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    # Three sequences: header 34 bytes, lengths at 34, pointers at 46, documents at 70.
    cases = {
        "not a Megatron index": lambda b, i: damage(i, 0, b"TTTT"),
        "inside its header": lambda b, i: i.write_bytes(i.read_bytes()[:20]),
        "version 2": lambda b, i: damage(i, 9, b"\2"),
        "dtype code 7": lambda b, i: damage(i, 17, b"\7"),
        "dtype code 99": lambda b, i: damage(i, 17, b"\x63"),
        "truncated or damaged": lambda b, i: i.write_bytes(i.read_bytes()[:-8]),
        "asks for": lambda b, i: damage(i, 18, b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
        "contradict": lambda b, i: damage(i, 46 + 8, b"\1"),
        "do not cover": lambda b, i: damage(i, 70 + 8, b"\3"),
        ".bin is truncated": lambda b, i: b.write_bytes(b.read_bytes()[:-1]),
        "longer than its index": lambda b, i: b.write_bytes(b.read_bytes() + b"\0\0"),
    }
    for number, (message, spoil) in enumerate(cases.items()):
        prefix = write_dataset(tmp_path / f"d{number}", [[1, 2], [3], [4, 5]])
        spoil(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
        with pytest.raises(UserError, match=message) as caught:
            IndexedDataset(prefix)
        assert prefix in str(caught.value)


def test_negative_lengths_that_add_up_are_refused(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2], [3], [4, 5]])
    damage(Path(f"{prefix}.idx"), 34, struct.pack("<iiiqqq", 6, -3, 2, 0, 12, 6))
    with pytest.raises(UserError, match="contradict"):
        IndexedDataset(prefix)


def test_missing_files_suggest_the_full_prefix(tmp_path: Path) -> None:
    write_dataset(tmp_path / "corpus_text_document", [[1]])
    with pytest.raises(UserError, match="corpus.idx does not exist; did you mean .*corpus_text_document"):
        IndexedDataset(tmp_path / "corpus")
    with pytest.raises(UserError, match="preprocess_data"):
        IndexedDataset(tmp_path / "nothing")
    Path(tmp_path / "corpus_text_document.bin").unlink()
    with pytest.raises(UserError, match="corpus_text_document.bin does not exist"):
        IndexedDataset(tmp_path / "corpus_text_document")


def test_shards_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    prefixes = [write_dataset(tmp_path / "a", [[1]], "uint16"), write_dataset(tmp_path / "b", [[1]], "int32")]
    with pytest.raises(UserError, match="int32 tokens and .*uint16"):
        merge_shards(prefixes, tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


def test_failed_writer_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2, 3]])
    with pytest.raises(RuntimeError), IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([9] * 10)
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]
    assert second_reader(prefix) == [[[1, 2, 3]]]


def test_replacing_a_dataset_drops_its_stale_sidecar(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2, 3]])
    Path(f"{prefix}.json").write_text("{}")
    write_dataset(tmp_path / "d", [[4]])
    assert second_reader(prefix) == [[[4]]] and not Path(f"{prefix}.json").exists()


def test_the_disk_has_both_files_before_it_has_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, mine = disk_log(tmp_path, monkeypatch), f"tmp-{os.getpid()}"
    write_dataset(tmp_path / "d", [[1, 2, 3]])
    synced = {name for call, *names in done[:3] if call == "fsync" for name in names}
    assert {f"d.bin.{mine}", f"d.idx.{mine}"} < synced
    named = [("replace", f"d.{end}.{mine}", f"d.{end}") for end in ("bin", "idx")]
    assert done[3:] == [*named, ("fsync", ".")]


KILLED = """
import os, signal, sys
from megaforge.data import indexed_dataset as module
stop = int(sys.argv[2])
calls = 0
def die(*arguments, real=None):
    global calls
    calls += 1
    if calls > stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
real_sync, real_replace = module.os.fsync, module.os.replace
module.os.fsync = lambda *a: die(*a, real=real_sync)
module.os.replace = lambda *a: die(*a, real=real_replace)
with module.IndexedDatasetWriter(sys.argv[1], "uint16") as writer:
    writer.add_document([1, 2, 3])
"""


@pytest.mark.parametrize("survived", range(5))
def test_killed_writer_shows_no_half_dataset(tmp_path: Path, survived: int) -> None:
    """Killed before each of its five durable steps (three syncs, two renames), no index is ever visible."""
    kill_writer(tmp_path, survived)
    assert not (tmp_path / "d.idx").exists()
    with pytest.raises(UserError, match="does not exist"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("survived", range(5))
def test_killed_writer_never_pairs_old_and_new(tmp_path: Path, survived: int) -> None:
    """Over an older dataset of the same size, a kill leaves the old one whole or none at all."""
    prefix = write_dataset(tmp_path / "d", [[7], [8, 9]])
    kill_writer(tmp_path, survived)
    if survived < 3:
        assert second_reader(prefix) == [[[7]], [[8, 9]]]
    else:
        assert not (tmp_path / "d.idx").exists()


def kill_writer(tmp_path: Path, survived: int) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = Path(indexed_dataset.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "d"), str(survived)],
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
