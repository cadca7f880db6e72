"""Pipeline stages change nothing: real trainers at pp x vpp x tp x dp against one rank.

Compared after two steps: loss and every other metric, every gradient, the gradient norm and every updated weight.
Noise on all weights keeps every gradient busy; the first blocks have no experts, so that some stages have none.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.models.stages import stage_layers
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import FlatShard, optimizer_shard
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.mappings import reduce_from_tensor_parallel
from megaforge.parallel.param_spec import ParamSpec, named_specs
from megaforge.training.prepare import prepare
from megaforge.training.trainer import Trainer
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_model_parity import SMALL
from tests.training.tiny import arguments, make_config, make_trainer, record, write_dataset

MODEL = ("--hybrid-layer-pattern", "R-*-RE*E", "--moe-aux-loss-coeff", "0.1", "--moe-z-loss-coeff", "0.1")
MICRO = ("--micro-batch-size", "1")
UNTIED = ("--untie-embeddings-and-output-weights",)
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def flags(prefix: str, *more: str) -> list[str]:
    common = ("--train-iters", "2", "--eval-iters", "2", "--eval-interval", "1", "--log-interval", "100")
    return arguments(
        prefix, *MODEL, *common, "--lr", "1e-3", "--lr-decay-style", "constant", "--clip-grad", "0.5", *more
    )


def trainer_of(argv: list[str]) -> Trainer:
    """As the entry script makes it, on one rank of a group that exists already or without one."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    parallel = make_config(argv).parallel
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    try:
        ctx = ParallelContext.create(
            tp=parallel.tensor_model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            cp=parallel.context_parallel_size,
            ep=parallel.expert_model_parallel_size,
            etp=parallel.expert_tensor_parallel_size,
        )
        return make_trainer(argv, ctx)
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]


def whole(spec: ParamSpec | FlatShard, local: Tensor, ctx: ParallelContext) -> Tensor:
    """The global tensor from this rank's share of it, its replicas' (ZeRO) and its tp neighbours'."""
    if isinstance(spec, FlatShard):
        share, spec = spec, spec.spec
        flat = local.new_zeros(math.prod(spec.local_shape(ctx)))
        flat[share.start : share.stop] = local
        local = reduce_from_tensor_parallel(flat, ctx.axis(spec.replica_axis)).view(spec.local_shape(ctx))
    full = local.new_zeros(spec.shape)
    for piece in spec.pieces(ctx):
        full[tuple(slice(a, b) for a, b in piece.global_box)] = piece.local_view(local)
    if spec.expert_dim is not None:
        full = reduce_from_tensor_parallel(full, ctx.ep)
    return full if spec.shard_dim is None else reduce_from_tensor_parallel(full, ctx.axis(spec.shard_axis))


def train(argv: list[str], noise: float = 0.05) -> dict[str, Any]:
    """A whole run; every rank's records, and the gradients (of the last step) and weights that it holds."""
    trainer = trainer_of(argv)
    if noise:
        perturb(trainer.model, trainer.ctx, noise)
    recorder = record(trainer)
    trainer.train()
    outcome: dict[str, Any] = {"records": recorder.records, "executed": trainer.engine.plan.describe()}
    ctx, named = trainer.ctx, list(named_specs(trainer.model))
    outcome["weights"] = {s.name: whole(s, p.detach(), ctx) for s, p in named}
    trained = [(s.name, p) for s, p in named if p.requires_grad]
    outcome["gradients"] = {n: whole(optimizer_shard(p), p.main_grad, ctx) for n, p in trained}  # type: ignore[attr-defined]
    outcome["moments"] = {key: whole(held, t, ctx) for key, held, t in trainer.optimizer.state_entries()}
    return outcome


def observed(trainer: Trainer) -> dict[str, Any]:
    """The records of the run of ``trainer`` from weights that no zero hides, and its gradients and weights at the end,
    whole."""
    perturb(trainer.model, trainer.ctx, 0.05)
    recorder = record(trainer)
    trainer.train()
    ctx, named = trainer.ctx, list(named_specs(trainer.model))
    trained = [(spec.name, p) for spec, p in named if p.requires_grad]
    return {
        "records": recorder.records,
        "weights": {spec.name: whole(spec, p.detach(), ctx) for spec, p in named},
        "gradients": {n: whole(optimizer_shard(p), p.main_grad, ctx) for n, p in trained},  # type: ignore[attr-defined]
    }


def compare(found: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    """Each rank's records and tensors equal those of one rank, and all ranks together hold everything."""
    for rank, outcome in enumerate(found):
        assert len(outcome["records"]) == len(expected["records"])
        for ours, theirs in zip(outcome["records"], expected["records"], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                same = value if isinstance(value, str) else pytest.approx(value, rel=tolerance)
                assert ours[name] == same, f"rank {rank}: {name}"
    for kind in ("weights", "gradients", "moments"):
        if kind not in found[0]:
            continue
        held = [(rank, name) for rank, outcome in enumerate(found) for name in outcome[kind]]
        assert {name for _, name in held} == set(expected[kind])
        for rank, name in held:
            theirs = expected[kind][name].double()  # codes are bytes
            assert bool(theirs.any()), f"{kind} of {name} is trivially zero"
            error = float((found[rank][kind][name] - theirs).norm() / theirs.norm())
            limit = 2 * tolerance if "exp_avg_sq" in name else tolerance  # a square doubles relative errors
            assert error <= limit, f"rank {rank}: {kind} of {name} differs by {error:.1e}"


# What the matrix (test_layout_matrix.py) does not have: an untied head, cuts by hand, evaluation in stages, moments.
LAYOUTS = {
    "pp2, gpipe, untied": (2, ("--pp", "2", "--pipeline-schedule", "gpipe", *UNTIED)),
    "pp2, one layer a stage": (2, ("--pp", "2", "--num-layers-per-virtual-pipeline-stage", "1", *UNTIED)),
    "pp2, zb-v, untied": (2, ("--pp", "2", "--pipeline-schedule", "zb-v", *UNTIED)),
    "pp2, cut by hand": (2, ("--pp", "2", "--hybrid-layer-pattern", "R-|*-RE*E")),
    "pp2 x ep2, vpp2": (4, ("--pp", "2", "--ep", "2", "--vpp", "2", *UNTIED)),
    "pp2 x zero 1, zb-v": (4, ("--pp", "2", "--zero", "1", "--pipeline-schedule", "zb-v")),
    "pp2 x zero 2, zb-v": (4, ("--pp", "2", "--zero", "2", "--pipeline-schedule", "zb-v", *MICRO)),
    "vpp2 x zero 2 x ep2": (4, ("--pp", "1", "--zero", "2", "--vpp", "2", "--ep", "2", *MICRO)),
    "pp2 x tp2, sp, vpp2": (4, ("--pp", "2", "--tp", "2", "--sp", "--vpp", "2")),
    "pp2 x dp2, zb-v": (4, ("--pp", "2", "--pipeline-schedule", "zb-v", "--ddp-bucket-size", "2000")),
}


@pytest.fixture(scope="module")
def one_rank(prefix: str) -> dict[bool, dict[str, Any]]:
    return {untied: train(flags(prefix, "--fp64", *(UNTIED if untied else ()))) for untied in (False, True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_change_nothing(ranks: RankPool, prefix: str, one_rank: dict[bool, dict[str, Any]], layout: str) -> None:
    world, more = LAYOUTS[layout]
    expected = one_rank[UNTIED[0] in more]
    found = ranks.run(world, train, flags(prefix, "--fp64", *more))
    assert found[0]["executed"].startswith(f"pp {more[1]} (")
    compare(found, expected, TOLERANCE)


def train_with_blocking_reduction(argv: list[str]) -> dict[str, Any]:
    """:func:`train` with every all-reduce done before the backward pass goes on: a bucket sent too early shows."""
    start = dist.all_reduce

    def blocking(*args: Any, **options: Any) -> dist.Work:
        work = start(*args, **{**options, "async_op": True})
        work.wait()
        return work

    with mock.patch.object(dist, "all_reduce", blocking):
        return train(argv)


def test_an_embedding_shared_by_two_stages_is_reduced_after_both(
    ranks: RankPool, prefix: str, one_rank: dict[bool, dict[str, Any]]
) -> None:
    argv = flags(prefix, "--fp64", "--vpp", "2", "--ddp-bucket-size", "2000")
    found = ranks.run(2, train_with_blocking_reduction, argv)
    assert found[0]["executed"] == "pp 1 (interleaved, vpp 2)"
    compare(found, one_rank[False], TOLERANCE)


@pytest.mark.parametrize(
    "layout", [("--pp", "2"), ("--pp", "2", "--vpp", "2"), ("--pp", "2", "--pipeline-schedule", "zb-v")]
)
def test_checkpoints_go_between_stages_and_one_rank(
    ranks: RankPool, prefix: str, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """Two steps in stages, two on one rank, two in stages again: as never having stopped, optimizer included."""
    expected = train(flags(prefix, "--fp64", "--train-iters", "6"))
    save = ("--save", str(tmp_path / "run"), "--fp64", "--train-iters", "6", "--log-interval", "100")
    again = (*save, "--load", str(tmp_path / "run"))
    found = [ranks.run(2, train, flags(prefix, *save, *layout, "--exit-interval", "2"))]
    found.append([train(flags(prefix, *again, "--exit-interval", "4"), 0.0)])
    found.append(ranks.run(2, train, flags(prefix, *again, *layout), 0.0))
    records = [record for part in found for record in part[0]["records"]]
    for outcome in found[-1]:
        outcome["records"] = records
    compare(found[-1], expected, 1e-10)


def test_offloading_on_a_cpu_changes_nothing(prefix: str, one_rank: dict[bool, dict[str, Any]]) -> None:
    compare([train(flags(prefix, "--fp64", "--cpu-offload-activations"))], one_rank[False], 0.0)


@pytest.mark.parametrize("recompute", ["full", "selective", "moe"])
def test_recomputation_changes_nothing(prefix: str, one_rank: dict[bool, dict[str, Any]], recompute: str) -> None:
    compare([train(flags(prefix, "--fp64", "--recompute", recompute))], one_rank[False], TOLERANCE)


def test_recomputation_in_virtual_stages_changes_nothing(
    ranks: RankPool, prefix: str, one_rank: dict[bool, dict[str, Any]]
) -> None:
    argv = flags(prefix, "--fp64", "--pp", "2", "--tp", "2", "--vpp", "2", "--recompute", "selective")
    compare(ranks.run(4, train, argv), one_rank[False], TOLERANCE)


@pytest.mark.parametrize(
    ("world", "schedule", "more"),
    [
        (2, "zb-v", ("--recompute", "selective")),
        (2, "zb-h1", ("--recompute", "moe")),
        (4, "zb-h1", ("--recompute", "full", "--tp", "2", "--sp")),
        (4, "zb-v", ("--recompute", "full", "--zero", "2", "--ep", "2", *MICRO)),
    ],
)
def test_recomputation_goes_with_split_backward(
    ranks: RankPool,
    prefix: str,
    one_rank: dict[bool, dict[str, Any]],
    world: int,
    schedule: str,
    more: tuple[str, ...],
) -> None:
    argv = flags(prefix, "--fp64", "--pp", "2", "--pipeline-schedule", schedule, *more)
    compare(ranks.run(world, train, argv), one_rank[False], TOLERANCE)


def kept_bytes(recompute: str) -> int:
    """What one micro-batch's graph keeps for its backward pass, besides weights."""
    cfg = ModelConfig(**{**SMALL, "hybrid_layer_pattern": "RE*-RE"})  # type: ignore[arg-type]
    model = HybridModel(make_layer_context(cfg, ParallelContext.single(), recompute=recompute))
    initialize_parameters(model, ParallelContext.single(), seed=1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens, tokens, torch.ones(2, 64))
    assert output.loss_sum.requires_grad
    return sum(kept.values())


def test_recomputation_keeps_less() -> None:
    none, full, selective, moe = (kept_bytes(name) for name in ("none", "full", "selective", "moe"))
    assert full < selective < none
    assert full < moe < none


@pytest.mark.parametrize(
    ("world", "more", "names"),
    [
        (2, ("--pp", "3"), ("--pp 3", "2 ranks")),
        (4, ("--pp", "4", "--vpp", "2"), ("8 stages", "4 blocks")),
        (2, ("--pp", "2", "--vpp", "2", "--global-batch-size", "6"), ("interleaved", "3 microbatches", "2 or 4")),
        (
            2,
            ("--pp", "2", "--vpp", "2", "--global-batch-size", "8", "--rampup-batch-size", "2", "2", "90"),
            ("--rampup-batch-size 2 2 90, at 2 sequences a batch", "interleaved", "1 microbatches"),
        ),
        (2, ("--pp", "2", "--vpp", "3", "--pipeline-schedule", "zb-v"), ("zb-v with --vpp 3", "--vpp 2")),
        (2, ("--pp", "2", "--vpp", "1", "--pipeline-schedule", "interleaved"), ("interleaved with --vpp 1",)),
        (2, ("--pp", "2", "--hybrid-layer-pattern", "R-|*-|RE*E"), ("cut by '|' into 3 stages", "is 2")),
        (2, ("--pp", "2", "--hybrid-layer-pattern", "|R-*-RE*E"), ("empty stage",)),
        (2, ("--pp", "2", "--hybrid-layer-pattern", "*-|R-"), ("first mixer must be R",)),
        (2, ("--pp", "2", "--num-layers-per-virtual-pipeline-stage", "3"), ("stage 3", "4 blocks", "valid: 1, 2")),
        (2, ("--pp", "2", "--num-layers-per-virtual-pipeline-stage", "1", "--vpp", "2"), ("twice",)),
    ],
)
def test_impossible_pipelines_are_refused_before_any_process_group(
    monkeypatch: pytest.MonkeyPatch, prefix: str, world: int, more: tuple[str, ...], names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as caught:
        prepare(make_config(flags(prefix, *more)))
    assert all(name in str(caught.value) for name in names), str(caught.value)


def test_costs_balance_stages() -> None:
    cfg = make_config(["--vocab-size", "64", "--num-layers", "8", "--layer-schedule", "rwkv"]).model
    assert stage_layers(cfg, 1, 64) == [range(8)]
    assert [len(layers) for layers in stage_layers(cfg, 4, 64)] == [2, 2, 2, 2]
    large = dataclasses.replace(cfg, vocab_size=200_000)
    sizes = [len(layers) for layers in stage_layers(large, 4, 64)]
    assert sizes[-1] == 1 and sum(sizes) == 8, "the head is worth several blocks"
    with pytest.raises(UserError, match="9 stages.*8 blocks"):
        stage_layers(cfg, 9, 64)
