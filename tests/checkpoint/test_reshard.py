"""A checkpoint of one layout fills any other, element for element; replicated pieces are written once."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megaforge.checkpoint.checkpoint import _why_ranks_differ, layout_of, load_checkpoint, save_checkpoint
from megaforge.checkpoint.manifest import MANIFEST_FILE, Manifest
from megaforge.checkpoint.safetensors_file import SafetensorsFile
from megaforge.checkpoint.shards import RANK_PREFIX, TensorEntry
from megaforge.errors import CheckpointError
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec
from tests.checkpoint.model_entries import INIT, SPECS, context, full_tensor, mismatches, model_entries, save_simulated

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_every_layout_loads_every_other(tmp_path, saved):
    save_simulated(tmp_path, 10, *saved, meta={"iteration": 10})
    for tp, dp in LAYOUTS:
        for rank in range(tp * dp):
            ctx = context(tp, dp, rank)
            entries = model_entries(ctx, filled=False)
            meta = load_checkpoint(tmp_path / "step_0000010", entries, ctx, verify=False)
            assert meta == {"iteration": 10}
            assert mismatches(entries, ctx) == 0


def test_replicated_pieces_are_written_once_and_balanced(tmp_path):
    plans = save_simulated(tmp_path, 1, 2, 2)
    pieces = [(item.index.fqn, item.index.offset) for plan in plans for item in plan.items]
    assert len(pieces) == len(set(pieces))
    model_bytes = sum(spec.numel * (4 + (4 if spec.keep_fp32 else 2)) for spec in SPECS)
    files = json.loads((tmp_path / "step_0000001" / MANIFEST_FILE).read_text())["files"]
    sizes = [
        sum(item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize for item in plan.items)
        for plan in plans
    ]
    assert sum(sizes) == model_bytes + 4  # and one byte of rank tensors each
    assert len(files) == 4
    assert max(sizes) - min(sizes) < 0.05 * model_bytes


def test_single_rank_file_is_plain_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ctx = ParallelContext.single()
    save_checkpoint(tmp_path, 1, model_entries(ctx, filled=True), {}, ctx)
    loaded = safetensors.load_file(tmp_path / "step_0000001" / "rank_00000.safetensors")
    whole = {spec.name for spec in SPECS if len(spec.parts) < 2}
    for name in whole:
        tensor = loaded[f"model.{name}"]
        assert torch.equal(tensor, full_tensor(f"model.{name}", tuple(tensor.shape), tensor.dtype))


def test_tensors_of_a_file_are_aligned_to_their_type(tmp_path):
    path = _save_one(tmp_path, [_entry("a", (3,), torch.bfloat16), _entry("b", (3,)), _entry("c", (1,), torch.uint8)])
    file = SafetensorsFile(path / "rank_00000.safetensors")
    assert [slot.name for slot in file.slots()] == ["b", "a", "c"]
    assert all(file.tensor(slot.name).data_ptr() % slot.dtype.itemsize == 0 for slot in file.slots())


def test_rank_tensors_return_only_at_the_same_layout(tmp_path, caplog):
    save_simulated(tmp_path, 1, 2, 1)
    for rank in range(2):
        own = {"rng": torch.tensor([99], dtype=torch.uint8)}
        load_checkpoint(
            tmp_path / "step_0000001", model_entries(context(2, 1, rank), filled=False), context(2, 1, rank), own
        )
        assert own["rng"].item() == rank
    assert "random states" not in caplog.text
    own = {"rng": torch.tensor([99], dtype=torch.uint8)}
    load_checkpoint(tmp_path / "step_0000001", model_entries(context(1, 2, 0), filled=False), context(1, 2, 0), own)
    assert own["rng"].item() == 99
    assert caplog.text.count("random states") == 1


def test_ranks_that_hold_other_experts_are_not_the_same_ranks(tmp_path):
    """Two layouts that differ in the experts' tensor parallelism alone; an older checkpoint does not tell."""

    def experts(etp, rank=0):
        return ParallelContext.of_rank(rank, 4, tp=2, ep=2, etp=etp)

    def manifest(layout):
        return Manifest(1, layout, {}, None, {}, {f"{RANK_PREFIX}00000/rng": {}})

    assert _why_ranks_differ(manifest(layout_of(experts(1))), experts(1)) is None
    reason = _why_ranks_differ(manifest(layout_of(experts(1))), experts(2))
    assert reason == "was written at etp 1, edp 2, this run is etp 2, edp 1"
    older = {axis: size for axis, size in layout_of(experts(1)).items() if axis not in ("etp", "edp")}
    assert _why_ranks_differ(manifest(older), experts(2)) is None


def _save_one(tmp_path, entries):
    return save_checkpoint(tmp_path, 1, entries, {}, ParallelContext.single())


def _entry(key, shape, dtype=torch.float32, **how):
    return TensorEntry(key, ParamSpec(key, shape, INIT, **how), torch.ones(shape, dtype=dtype))


def test_missing_and_extra_keys_are_named(tmp_path):
    path = _save_one(tmp_path, [_entry("model.a", (4,)), _entry("optimizer.a", (4,))])
    ctx = ParallelContext.single()
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that are wanted: model\.b"):
        load_checkpoint(path, [_entry("model.b", (4,))], ctx)
    with pytest.raises(CheckpointError, match=r"nothing here asks for: optimizer\.a"):
        load_checkpoint(path, [_entry("model.a", (4,))], ctx)
    load_checkpoint(path, [_entry("model.a", (4,))], ctx, allow_extra=("optimizer.",))


def test_shape_and_type_mismatches_are_named(tmp_path):
    path = _save_one(tmp_path, [_entry("model.a", (4, 2))])
    ctx = ParallelContext.single()
    with pytest.raises(CheckpointError, match=r"model\.a: shape \(4, 2\) in the checkpoint, \(2, 4\) here"):
        load_checkpoint(path, [_entry("model.a", (2, 4))], ctx)
    wanted = TensorEntry("model.a", ParamSpec("a", (4, 2), INIT), torch.zeros(4, 2, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"model\.a: torch\.float32 in the checkpoint, torch\.bfloat16 here"):
        load_checkpoint(path, [wanted], ctx)
    load_checkpoint(path, [wanted], ctx, cast=True)
    assert torch.equal(wanted.tensor, torch.ones(4, 2, dtype=torch.bfloat16))


def test_a_local_tensor_that_contradicts_its_declaration_is_refused(tmp_path):
    wrong = TensorEntry("a", ParamSpec("a", (4, 2), INIT), torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match=r"a: local shape \(2, 2\), but its declaration says \(4, 2\)"):
        _save_one(tmp_path, [wrong])
    with pytest.raises(RuntimeError, match="taken twice"):
        _save_one(tmp_path, [_entry("a", (2,)), _entry("a", (2,))])
    assert not list(tmp_path.iterdir())


def test_a_save_whose_pieces_do_not_make_up_the_tensor_is_refused(tmp_path):
    half = context(2, 1, 0)  # the other half is nowhere
    with pytest.raises(RuntimeError, match="elements are in no piece"):
        save_checkpoint(tmp_path, 1, model_entries(half, filled=True), {}, half)
    assert not list(tmp_path.glob("*step*"))


def test_saved_pieces_with_a_hole_are_refused_at_load(tmp_path):
    """A manifest that is whole by its hashes yet lacks a piece, as a faulty writer would leave it."""
    from megaforge.checkpoint.manifest import read_manifest, write_manifest

    save_simulated(tmp_path, 1, 2, 1)
    path = tmp_path / "step_0000001"
    manifest = read_manifest(path)
    key = "model.layers.0.mixer.qkv.weight"
    record = manifest.tensors[key]
    manifest.tensors[key] = record._replace(chunks=record.chunks[1:])
    write_manifest(path, manifest)
    ctx = ParallelContext.single()
    with pytest.raises(CheckpointError, match=rf"{key}: .* elements are in no piece"):
        load_checkpoint(path, model_entries(ctx, filled=False), ctx)
    doubled = record._replace(chunks=(*record.chunks, record.chunks[0]))
    manifest.tensors[key] = doubled
    write_manifest(path, manifest)
    with pytest.raises(CheckpointError, match=rf"{key}: .* overlap"):
        load_checkpoint(path, model_entries(ctx, filled=False), ctx)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
    ids=str,
)
def test_every_type_survives_bit_for_bit(tmp_path, dtype):
    values = torch.randint(
        0, 2 if dtype == torch.bool else 256, (math.prod((5, 3)) * dtype.itemsize,), dtype=torch.uint8
    ).view(dtype)[:15]
    spec = ParamSpec("a", (5, 3), INIT)
    path = _save_one(tmp_path, [TensorEntry("a", spec, values.reshape(3, 5).T)])  # not contiguous
    loaded = torch.zeros(5, 3, dtype=dtype)
    load_checkpoint(path, [TensorEntry("a", spec, loaded)], ParallelContext.single())
    original = values.reshape(3, 5).T.contiguous()
    assert torch.equal(loaded.reshape(-1).view(torch.uint8), original.reshape(-1).view(torch.uint8))


def test_ranks_that_hold_other_stages_are_not_the_same_ranks(tmp_path):
    """Without other sizes of an axis: one rank of two chunks is another than one of one."""
    ctx, own = ParallelContext.single(), {"rng": torch.ones(1)}
    path = save_checkpoint(tmp_path, 1, [_entry("model.a", (4,))], {}, ctx, own, chunks=2)
    for chunks, taken in ((2, 1.0), (1, 0.0)):
        fresh = {"rng": torch.zeros(1)}
        load_checkpoint(path, [_entry("model.a", (4,))], ctx, fresh, chunks=chunks)
        assert fresh["rng"].item() == taken
