"""Ranges of flattened tensors as boxes, and buckets cut into slices: every element once, whatever the sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megaforge.parallel.buckets import ALIGNMENT, BALANCED, BucketPolicy, make_bucket_groups
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.flat_shard import FlatShard, flat_boxes, optimizer_shard
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.param_spec import ParamSpec, make_parameter, named_specs
from megaforge.parallel.zero import ShardedParameters

SPECS = (
    ParamSpec("embedding", (7, 6), Constant(0.0)),
    ParamSpec("qkv", (16, 5), Constant(0.0), shard_dim=0, parts=(8, 4, 4)),
    ParamSpec("row", (3, 10), Constant(0.0), shard_dim=1),
    ParamSpec("up", (4, 6, 3), Constant(0.0), shard_dim=1, shard_axis="etp", expert_dim=0, parts=(4, 2)),
    ParamSpec("expert_scale", (4, 3), Constant(0.0), shard_axis="etp", expert_dim=0),
    ParamSpec("router", (4, 3), Constant(0.0), tp_partial_grad=True, keep_fp32=True),
    ParamSpec("scale", (), Constant(0.0)),
    ParamSpec("norm", (5,), Constant(0.0), keep_fp32=True),
)


class Holder(nn.Module):
    def __init__(self, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.declared = nn.ParameterList([make_parameter(spec, ctx, dtype) for spec in SPECS])


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_a_range_is_few_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    boxes = list(flat_boxes(shape, start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    found = []
    for first, box in boxes:
        piece = tensor[tuple(slice(a, b) for a, b in box)]
        assert piece.is_contiguous() and int(piece.flatten()[0]) == first
        found += piece.flatten().tolist()
    assert found == list(range(start, stop))


LAYOUTS = [
    (1, 1, 1, None),
    (3, 1, 1, None),
    (4, 2, 1, None),
    (4, 1, 2, None),
    (8, 2, 2, 2),
    (8, 2, 4, 1),
    (20, 2, 2, 1),
]


@pytest.mark.parametrize(("world", "tp", "ep", "etp"), LAYOUTS)
@pytest.mark.parametrize("bucket_size", [1, 40, 10_000])
def test_shares_make_up_every_parameter_once(world: int, tp: int, ep: int, etp: int | None, bucket_size: int) -> None:
    """Each counted share writes its numbers into the global tensor through its pieces; all elements are hit once."""
    hits = {spec.name: torch.zeros(spec.shape) for spec in SPECS}
    values = {spec.name: torch.arange(spec.numel, dtype=torch.float32).view(spec.shape) for spec in SPECS}
    orders = set()
    for rank in range(world):
        ctx = ParallelContext.of_rank(rank, world, tp=tp, ep=ep, etp=etp)
        model = Holder(ctx, torch.float32)
        for spec, parameter in named_specs(model):
            parameter.data.copy_(spec.take_local(values[spec.name], ctx))
        shards = ShardedParameters(model, ctx, bucket_size=bucket_size)
        orders.add(tuple(tuple(p.spec.name for p in bucket.parameters) for bucket in shards.buckets))
        for spec, parameter in named_specs(model):
            held = optimizer_shard(parameter)
            assert isinstance(held, FlatShard)
            assert torch.equal(parameter, spec.take_local(values[spec.name], ctx))
            own = shards.own(parameter)
            assert own.shape == held.local_shape(ctx)
            for piece in held.pieces(ctx):
                where = tuple(slice(a, b) for a, b in piece.global_box)
                assert torch.equal(piece.local_view(own), values[spec.name][where])
                assert piece.local_view(own).shape == piece.shape
                if held.is_first_copy(ctx):
                    hits[spec.name][where] += 1
    assert len(orders) == 1, "every rank must send the same buckets in the same order"
    for name, count in hits.items():
        assert bool((count == 1).all()), f"{name}: {count}"


def test_buckets_are_packed_by_kind_and_due_with_their_last_parameter() -> None:
    ctx = ParallelContext.of_rank(0, 4, ep=2)
    buckets, shared = make_bucket_groups([Holder(ctx, torch.bfloat16)], ctx, 60)
    assert not shared
    names = [[p.spec.name for p in bucket.parameters] for bucket in buckets]
    assert names == [["norm", "router"], ["expert_scale", "up"], ["scale", "row"], ["qkv"], ["embedding"]]
    assert {bucket.replicas.name for bucket in buckets} == {"dp_cp", "edp"}
    for bucket in buckets:
        filled = sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in bucket.parameters)
        unit = bucket.replicas.size * ALIGNMENT
        assert bucket.size % unit == 0 and filled <= bucket.size < filled + unit
        assert len({p.dtype for p in bucket.parameters}) == 1


@pytest.mark.parametrize(("world", "bucket_size"), [(1, 10_000), (3, 10_000), (3, 40), (4, 60)])
def test_parameters_and_shares_start_aligned_and_gaps_stay_zero(world: int, bucket_size: int) -> None:
    """Odd sizes everywhere: starts within whole buffers and within slices, and what lies between parameters."""
    for rank in range(world):
        ctx = ParallelContext.of_rank(rank, world)
        model = Holder(ctx, torch.float32)
        shards = ShardedParameters(model, ctx, bucket_size=bucket_size)
        reducer = GradientReducer(model, ctx, shards=shards)
        for gathered, gradients in zip(
            reversed(shards._gathers),
            (g for bucket_group in reducer._bucket_groups for g in bucket_group.gradients),
            strict=True,
        ):
            bucket = gathered.bucket
            assert bucket is gradients.bucket and gradients.own is not None and gradients.full is not None
            assert all(start % ALIGNMENT == 0 for start in (*bucket.starts, bucket.slice_size))
            for own in bucket.own_views(gradients.own):
                assert not len(own) or own.storage_offset() % ALIGNMENT == 0
            for parameter in bucket.parameters:
                parameter.data.fill_(1.0)
                parameter.grad = torch.ones_like(parameter)
                gradients.take_in(parameter)
            numbers = sum(p.numel() for p in bucket.parameters)
            assert float(gathered.flat.sum()) == float(gradients.full.sum()) == numbers
            held = sum(stop - start for start, stop in bucket.own_ranges())
            assert float(gradients.own.sum()) == held, "the norm and the sum over replicas see parameters only"


def test_a_tied_weight_has_a_bucket_of_its_own() -> None:
    ctx = ParallelContext.of_rank(1, 2)
    model = Holder(ctx, torch.float32)
    model.declared[1].spec = dataclasses.replace(model.declared[1].spec, tied_to="head.weight")
    names = [[p.spec.name for p in bucket.parameters] for bucket in make_bucket_groups([model], ctx, 1000)[0]]
    assert ["qkv"] in names
    assert sorted(name for bucket in names for name in bucket) == sorted(spec.name for spec in SPECS)


WHOLE = BucketPolicy("whole", lambda spec, ctx: float(spec.numel**2))
SIZES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30)


@given(SIZES, st.sampled_from([1, 2, 3, 8]))
def test_whole_parameters_lie_in_one_slice_each_and_slices_cost_alike(sizes: list[tuple[int, int]], world: int) -> None:
    specs = [ParamSpec(f"p{i}", (rows, columns), Constant(0.0)) for i, (rows, columns) in enumerate(sizes)]
    held: dict[str, list[int]] = {}
    for rank in range(world):
        ctx = ParallelContext.of_rank(rank, world)
        model = nn.Module()
        model.declared = nn.ParameterList([make_parameter(spec, ctx, torch.float32) for spec in specs])
        buckets = make_bucket_groups([model], ctx, 20, lambda spec: WHOLE)[0]
        for bucket in buckets:
            assert all(start % ALIGNMENT == 0 for start in bucket.starts)
            assert len(bucket.parameters) >= min(len(specs), BALANCED * world) or bucket is buckets[-1]
            costs = [0.0]
            for parameter, (low, high) in zip(bucket.parameters, bucket.own_ranges(), strict=True):
                assert (low, high) in ((0, parameter.numel()), (low, low))
                if high > low:
                    held.setdefault(parameter.spec.name, []).append(rank)
                    costs.append(parameter.numel() ** 2)
            total = sum(float(p.numel() ** 2) for p in bucket.parameters)
            assert sum(costs) <= total / world + max(costs), "longest processing time"
    assert {name: len(ranks) for name, ranks in held.items()} == {spec.name: 1 for spec in specs if spec.numel}
