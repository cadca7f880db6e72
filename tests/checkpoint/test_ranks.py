"""Checkpoints of real gloo ranks: every pair of layouts, and one rank's trouble shared by all."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
from pathlib import Path

import pytest
import torch

from megaforge.checkpoint import find
from megaforge.checkpoint.checkpoint import _layouts, load_checkpoint, save_checkpoint
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.shards import TensorEntry
from megaforge.parallel.context import ParallelContext
from tests.checkpoint.model_entries import mismatches, model_entries, save_and_retain

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))


def _layouts_of(world: int) -> list[tuple[int, int]]:
    return [(tp, dp) for tp, dp in LAYOUTS if tp * dp == world]


def _save_layouts(directory: Path, world: int) -> None:
    for tp, dp in _layouts_of(world):
        ctx = ParallelContext.create(tp=tp)
        own = {"rng": torch.full((3,), ctx.world.rank, dtype=torch.uint8)}
        meta = {"layout": f"{tp}x{dp}"}
        save_checkpoint(directory / f"{tp}x{dp}", 5, model_entries(ctx, filled=True), meta, ctx, own)


def _load_layouts(directory: Path, world: int) -> int:
    """Loads what every layout saved; returns the number of elements that are wrong on this rank."""
    wrong = 0
    for (tp, dp), (saved_tp, saved_dp) in itertools.product(_layouts_of(world), LAYOUTS):
        ctx = ParallelContext.create(tp=tp)
        name = f"{saved_tp}x{saved_dp}"
        path = find_checkpoint(directory / name, ctx)
        entries, own = model_entries(ctx, filled=False), {"rng": torch.full((3,), 99, dtype=torch.uint8)}
        assert load_checkpoint(path, entries, ctx, own, verify=False) == {"layout": name}
        wrong += mismatches(entries, ctx)
        same_layout = (tp, dp) == (saved_tp, saved_dp)
        assert own["rng"].tolist() == [ctx.world.rank if same_layout else 99] * 3
    return wrong


def test_every_pair_of_layouts(ranks, tmp_path):
    for world in (1, 2, 4):
        ranks.run(world, _save_layouts, tmp_path, world)
    for world in (1, 2, 4):
        assert ranks.run(world, _load_layouts, tmp_path, world) == [0] * world


def test_another_layout_is_told_by_the_axes_that_changed():
    layout = {"tp": 2, "cp": 1, "dp": 1, "ep": 1, "etp": 2, "edp": 1, "world": 2}
    assert _layouts(layout, {**layout, "tp": 1, "dp": 2, "etp": 1, "edp": 2}) == (
        "was written at tp 2, dp 1, this run is tp 1, dp 2"
    )
    assert _layouts(layout, {**layout, "etp": 1, "edp": 2}) == "was written at etp 2, edp 1, this run is etp 1, edp 2"
    assert _layouts({"other": 2, "tp": 1}, {"tp": 1, "world": 1}) == "was written at other 2, this run is other 1"
    assert _layouts({"other": 1}, {"tp": 4, "world": 4}) is None
    assert _layouts({"tp": 1, "world": 2}, {"tp": 1, "world": 1}) == "was written at world 2, this run is world 1"


def _message(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _fill_disk_of_rank(directory: Path, full_rank: int, how: str) -> tuple[str, str, int]:
    """Saves step 1, then step 2 with one rank out of space, then step 3; returns the error, what was found between,
    and how many elements of it are wrong."""
    ctx = ParallelContext.create(tp=2)
    save_checkpoint(directory, 1, model_entries(ctx, filled=True), {}, ctx)
    limits, fsync = resource.getrlimit(resource.RLIMIT_FSIZE), os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if ctx.world.rank == full_rank and how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    elif ctx.world.rank == full_rank:
        os.fsync = full
    try:
        error = _message(lambda: save_checkpoint(directory, 2, model_entries(ctx, filled=True), {}, ctx))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        os.fsync = fsync
    path = find_checkpoint(directory, ctx)
    entries = model_entries(ctx, filled=False)
    load_checkpoint(path, entries, ctx)
    torch.distributed.barrier()
    save_and_retain(directory, 3, model_entries(ctx, filled=True), {}, ctx, keep_last=1)
    return error, path.name, mismatches(entries, ctx)


@pytest.mark.parametrize(("full_rank", "how"), [(0, "fsync"), (1, "fsync"), (1, "limit")])
def test_one_rank_out_of_space_fails_the_save_on_all(ranks, tmp_path, full_rank, how):
    results = ranks.run(2, _fill_disk_of_rank, tmp_path, full_rank, how)
    assert results[0] == results[1]
    error, found, wrong = results[0]
    assert error.startswith("CheckpointError") and "step 2 was not written, earlier ones stay valid" in error
    assert ("No space left" if how == "fsync" else "File too large") in error
    if full_rank:
        assert f"rank {full_rank}: " in error
    assert (found, wrong) == ("step_0000001", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000003"]


def _find_with_warnings(directory: Path) -> tuple[str, int]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("megaforge").addHandler(handler)
    try:
        path = find_checkpoint(directory, ParallelContext.create(tp=2), quarantine_damaged=True)
    finally:
        logging.getLogger("megaforge").removeHandler(handler)
    return path.name, len(records)


def _save_steps(directory: Path, steps: int) -> None:
    ctx = ParallelContext.create(tp=2)
    for step in range(1, steps + 1):
        save_checkpoint(directory, step, model_entries(ctx, filled=True), {}, ctx)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors", "manifest.json"])
def test_all_ranks_agree_on_the_fallback_and_one_warns(ranks, tmp_path, name):
    ranks.run(2, _save_steps, tmp_path, 2)
    os.truncate(tmp_path / "step_0000002" / name, 50)
    assert ranks.run(2, _find_with_warnings, tmp_path) == [("step_0000001", 1), ("step_0000001", 0)]
    assert (tmp_path / "step_0000002.damaged").is_dir()


def _find_on_private_disk(directory: Path) -> str:
    """Rank 1 sees none of the files, as when the directory is on a disk of rank 0's own."""
    check = find.check_file
    ctx = ParallelContext.create(tp=2)
    if ctx.world.rank == 1:
        find.check_file = lambda path, record: check(Path("/nowhere") / path.name, record)
    try:
        return _message(lambda: find_checkpoint(directory, ctx, quarantine_damaged=True))
    finally:
        find.check_file = check


def test_a_directory_that_is_not_shared_is_not_taken_for_damage(ranks, tmp_path):
    ranks.run(2, _save_steps, tmp_path, 1)
    errors = ranks.run(2, _find_on_private_disk, tmp_path)
    assert errors[0] == errors[1]
    assert "rank 1: " in errors[0] and "this directory is not the same for all ranks" in errors[0]
    assert (tmp_path / "step_0000001").is_dir()


def _one_rank_errs(directory: Path) -> list[str]:
    """Mistakes that only rank 1 makes, in each phase."""
    ctx = ParallelContext.create(tp=2)
    good, errors = model_entries(ctx, filled=True), []
    first = good[0]
    other_dtype = TensorEntry(first.key, first.spec, first.tensor.double())
    other_shape = TensorEntry(first.key, first.spec, first.tensor[1:])
    for bad in (other_shape, other_dtype):
        entries = [bad, *good[1:]] if ctx.world.rank == 1 else good
        errors.append(_message(lambda entries=entries: save_checkpoint(directory, 1, entries, {}, ctx)))
    path = save_checkpoint(directory, 1, good, {}, ctx)
    for bad in (other_shape, other_dtype):
        entries = [bad, *good[1:]] if ctx.world.rank == 1 else good
        errors.append(_message(lambda entries=entries: load_checkpoint(path, entries, ctx)))
    errors.append(_message(lambda: load_checkpoint(path, good[ctx.world.rank :], ctx)))  # rank 1 asks for one less
    errors.append(_message(lambda: load_checkpoint(path, good[1:], ctx)))
    errors.append(_message(lambda: find_checkpoint(directory / "nowhere", ctx)))
    return errors


def test_a_mistake_of_one_rank_is_every_ranks_error(ranks, tmp_path):
    errors, others = ranks.run(2, _one_rank_errs, tmp_path)
    assert errors == others
    wanted = [
        "local shape",
        "ranks disagree",
        "local shape",
        "float64 here",
        "no error",
        "nothing here asks for",
        "does not exist",
    ]
    for text, expected in zip(errors, wanted, strict=True):
        assert expected in text
