"""A rank's file and the table of all files are what a save writes."""

from __future__ import annotations

from pathlib import Path

import torch

from megaforge.checkpoint.checkpoint import save_checkpoint
from megaforge.checkpoint.manifest import read_manifest
from megaforge.checkpoint.own_file import file_name, held_pieces, tensor_table, write_own_file
from megaforge.checkpoint.shards import TensorEntry, build_shards
from megaforge.parallel.context import ParallelContext

CTX = ParallelContext.single()


def test_the_bytes_and_the_table_of_a_save(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.int64)
    entries = [TensorEntry(f"t{n}", None, torch.arange(6).view(2, 3).to(kind)) for n, kind in enumerate(kinds)]
    saved = save_checkpoint(tmp_path, 7, entries, {}, CTX)
    shards, name = build_shards(entries, {}, CTX), file_name(0, None)
    record = write_own_file(shards, tmp_path, name, 7, None)
    assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    manifest = read_manifest(saved)
    assert manifest.files == {name: record}
    assert tensor_table([held_pieces(shards)], [name]) == manifest.tensors


def test_pieces_of_several_ranks_are_one_tensor() -> None:
    entries = [TensorEntry("x", None, torch.zeros(4))]
    [held] = held_pieces(build_shards(entries, {}, CTX))
    halves = [[held._replace(offsets=(start,), sizes=(2,))] for start in (0, 2)]
    names = [file_name(rank, None) for rank in (0, 1)]
    table = tensor_table(halves, names)
    assert [(chunk.file, chunk.offsets) for chunk in table["x"].chunks] == [(names[0], (0,)), (names[1], (2,))]
