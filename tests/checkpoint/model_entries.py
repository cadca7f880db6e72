"""A model's worth of tensors of every sharding kind, whose content is known from the key alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint.planner import SavePlan

from megaforge.checkpoint.checkpoint import enforce_retention, layout_of, save_checkpoint
from megaforge.checkpoint.directory import Retention, commit
from megaforge.checkpoint.planner import ShardSavePlanner
from megaforge.checkpoint.shards import TensorEntry, build_shards
from megaforge.checkpoint.storage import CheckpointHead, CheckpointWriter
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.param_spec import ParamSpec

INIT = Constant(0.0)
SPECS = (
    ParamSpec("embedding.weight", (104, 12), INIT, shard_dim=0),
    ParamSpec("layers.0.mixer.qkv.weight", (32, 12), INIT, shard_dim=0, parts=(16, 8, 8)),
    ParamSpec("layers.0.mixer.out.weight", (12, 16), INIT, shard_dim=1),
    ParamSpec("layers.0.ffn.gate_up.weight", (48, 12), INIT, shard_dim=0, parts=(24, 24)),
    ParamSpec("layers.0.ffn.experts.w1", (3, 16, 12), INIT, shard_dim=1, parts=(8, 8)),
    ParamSpec("layers.0.ffn.experts.w2", (3, 12, 8), INIT, shard_dim=2),
    ParamSpec("layers.0.mixer_norm.weight", (12,), INIT),
    ParamSpec("layers.0.ffn.router.weight", (3, 12), INIT, keep_fp32=True),
    ParamSpec("scale", (), INIT),
)


def full_tensor(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The content of the tensor ``key``: any key, shape and type give their own numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def context(tp: int, dp: int, rank: int) -> ParallelContext:
    """Rank ``rank`` of a tp x dp world, without a process group."""
    return ParallelContext.of_rank(rank, tp * dp, tp=tp)


def model_entries(ctx: ParallelContext, *, filled: bool) -> list[TensorEntry]:
    """Model weights in bf16 (fp32 where kept) and optimizer moments in fp32: this rank's parts, or NaN to be filled."""
    entries = []
    for spec in SPECS:
        kept = torch.float32 if spec.keep_fp32 else torch.bfloat16
        for key, dtype in ((f"model.{spec.name}", kept), (f"optimizer.exp_avg.{spec.name}", torch.float32)):
            local = spec.take_local(full_tensor(key, spec.shape, dtype), ctx)
            entries.append(TensorEntry(key, spec, local if filled else torch.full_like(local, float("nan"))))
    return entries


def save_and_retain(
    directory: Path, step: int, entries, meta, ctx, *, keep_last=0, keep_best=0, keep_every=0, **how
) -> Path:
    """:func:`save_checkpoint`, and what follows where older checkpoints may go."""
    path = save_checkpoint(directory, step, entries, meta, ctx, **how)
    enforce_retention(path, ctx, Retention(keep_last, keep_best, keep_every))
    return path


def mismatches(entries: Iterable[TensorEntry], ctx: ParallelContext) -> int:
    """How many elements are not, bit for bit, what :func:`full_tensor` says."""
    wrong = 0
    for key, spec, tensor in entries:
        expected = spec.take_local(full_tensor(key, spec.shape, tensor.dtype), ctx)
        wrong += int((expected != tensor).sum())
    return wrong


def save_simulated(directory: Path, step: int, tp: int, dp: int, meta: dict | None = None) -> list[SavePlan]:
    """What ``dcp.save`` does over tp x dp ranks, played through in this process; returns the final plans."""
    contexts = [context(tp, dp, rank) for rank in range(tp * dp)]
    head = CheckpointHead(step, layout_of(contexts[0]), meta or {}, None)
    planners, writers, plans = [], [], []
    for rank, ctx in enumerate(contexts):
        planner, writer = ShardSavePlanner(), CheckpointWriter(directory, head, rank)
        own = {"rng": torch.tensor([rank], dtype=torch.uint8)}
        planner.set_up_planner(build_shards(model_entries(ctx, filled=True), own, ctx), is_coordinator=rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        planners.append(planner)
        writers.append(writer)
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).value()
        for writer, planner, plan in zip(writers, planners, plans, strict=True)
    ]
    writers[0].finish(metadata, results)
    commit(directory, writers[0].manifest)
    return plans
