"""Saves in the background: the same bytes, of the moment they were started at, and one rank's trouble shared by all."""

from __future__ import annotations

import errno
import io
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megaforge.checkpoint.background import BackgroundSave, own_pieces
from megaforge.checkpoint.checkpoint import Snapshot, layout_of, load_checkpoint, save_checkpoint, take_snapshot
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.shards import Shard, TensorEntry, build_shards
from megaforge.checkpoint.storage import CheckpointHead, CheckpointWriter
from megaforge.errors import CheckpointError
from megaforge.parallel.context import ParallelContext
from tests.checkpoint.model_entries import mismatches, model_entries

CTX = ParallelContext.single()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _snapshot(step: int, entries: list[TensorEntry], ctx: ParallelContext) -> Snapshot:
    own = {"rng": torch.full((3,), ctx.world.rank, dtype=torch.uint8)}
    return take_snapshot(step, entries, {"values": [step]}, ctx, own)


def _save_both_ways(directory: Path) -> tuple[int, int, bool]:
    """Two steps by each form; live memory is spoilt as soon as a save is started. Returns the bytes of this rank's
    copies, those of all that it holds, and whether the second save reused the buffers of the first."""
    ctx = ParallelContext.create(tp=2)
    background = BackgroundSave(ctx)
    places = []
    for step in (1, 2):
        entries = model_entries(ctx, filled=True)
        save_checkpoint(
            directory / "plain",
            step,
            entries,
            {"values": [step]},
            ctx,
            {"rng": torch.full((3,), ctx.world.rank).byte()},
        )
        snapshot = _snapshot(step, entries, ctx)
        background.start(snapshot, directory / "background")
        snapshot.head.meta["values"].append("later")
        for _, _, tensor in entries:
            tensor.fill_(float("nan"))
        assert background.in_flight
        path, written = background.wait()
        assert (path.name, written) == (f"step_{step:07d}", step) and not background.in_flight
        places.append({place: buffer.data_ptr() for place, buffer in background._buffers.items()})
    copied = sum(buffer.nbytes for buffer in background._buffers.values())
    return copied, sum(tensor.nbytes for _, _, tensor in entries), places[0] == places[1]


def test_the_same_bytes_at_a_layout_with_replicas(ranks, tmp_path):
    results = ranks.run(4, _save_both_ways, tmp_path)
    assert contents(tmp_path / "plain") == contents(tmp_path / "background") != {}
    copied, held, reused = (sum(column) for column in zip(*results, strict=True))
    assert reused == 4, "buffers stay from save to save"
    assert copied < 0.6 * held, "of two replicas each piece is copied by one"


def _fail_on_one_rank(directory: Path, full_rank: int) -> tuple[str, str, int]:
    ctx = ParallelContext.create(tp=2)
    background = BackgroundSave(ctx)
    background.start(_snapshot(1, model_entries(ctx, filled=True), ctx), directory)
    background.wait()
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if ctx.world.rank == full_rank:
        os.fsync = full
    try:
        background.start(_snapshot(2, model_entries(ctx, filled=True), ctx), directory)
        background.wait()
        error = "no error"
    except CheckpointError as raised:
        error = str(raised)
    finally:
        os.fsync = fsync
    found = find_checkpoint(directory, ctx)
    background.start(_snapshot(3, model_entries(ctx, filled=True), ctx), directory)
    path, _ = background.wait()
    entries = model_entries(ctx, filled=False)
    load_checkpoint(path, entries, ctx)
    return error, found.name, mismatches(entries, ctx)


def test_a_rank_that_cannot_write_fails_the_save_on_all(ranks, tmp_path):
    results = ranks.run(2, _fail_on_one_rank, tmp_path, 1)
    assert results[0] == results[1]
    error, found, wrong = results[0]
    assert "step 2 was not written, earlier ones stay valid: rank 1: " in error and "No space left" in error
    assert (found, wrong) == ("step_0000001", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001", "step_0000003"]


def test_pieces_are_dealt_anew_when_they_change(tmp_path):
    background = BackgroundSave(CTX)
    for step, names in ((1, "ab"), (2, "abc"), (3, "b")):
        entries = [TensorEntry(name, None, torch.full((step,), float(step))) for name in names]
        background.start(take_snapshot(step, entries, {}, CTX), tmp_path)
        path, _ = background.wait()
        read = [TensorEntry(name, None, torch.zeros(step)) for name in names]
        load_checkpoint(path, read, CTX)
        assert all((entry.tensor == step).all() for entry in read)
        assert {key for key, _ in background._buffers} == set(names), "what is not saved any more takes no memory"


def test_pieces_that_do_not_make_up_a_tensor_are_refused_before_anything_is_written(tmp_path):
    half = Shard((4,), [((0,), torch.ones(2))])
    snapshot = Snapshot(CheckpointHead(1, layout_of(CTX), {}, None), {"half": half})
    with pytest.raises(CheckpointError, match="half: "):
        BackgroundSave(CTX).start(snapshot, tmp_path)
    assert list(tmp_path.iterdir()) == []
    whole = build_shards([TensorEntry("whole", None, torch.ones(()))], {}, CTX)
    assert own_pieces(whole, CTX) == {("whole", torch.Size([]))}


def test_one_at_a_time_and_the_end_waits(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="megaforge")
    background, may_go_on, fsync = BackgroundSave(CTX), threading.Event(), os.fsync
    with pytest.raises(ValueError, match="no save was started"):
        background.wait()
    background.finish()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (may_go_on.wait(300), fsync(descriptor)))
    background.start(take_snapshot(1, [TensorEntry("x", None, torch.ones(4))], {}, CTX), tmp_path)
    assert background.writing
    with pytest.raises(ValueError, match="one save at a time"):
        background.start(take_snapshot(2, [], {}, CTX), tmp_path)
    may_go_on.set()
    background.finish()
    assert find_checkpoint(tmp_path, CTX).name == "step_0000001" and "step_0000001 was still written" in caplog.text

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    background.start(take_snapshot(2, [TensorEntry("x", None, torch.ones(4))], {}, CTX), tmp_path)
    background.finish()  # does not hide the exception by which the run ends
    assert "step 2 was not written either" in caplog.text


def test_only_tensors_go_into_a_file(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointHead(1, {}, {}, None), 0)
    with pytest.raises(ValueError, match="a: only tensors go into a checkpoint file"):
        writer.finish(Metadata({"a": BytesStorageMetadata()}), [])
    item = WriteItem(MetadataIndex("b"), WriteItemType.BYTE_IO)
    planner = SimpleNamespace(resolve_data=lambda _: io.BytesIO())
    with pytest.raises(ValueError, match="b: only tensors go into a checkpoint file"):
        writer._tensor(planner, item)
