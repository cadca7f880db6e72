"""Predicted parameter, gradient and optimizer bytes equal what is registered and what a real run holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.memory import rank_memory
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.stages import StagePart, cut_stages, model_parts, stage_parameters
from megaforge.planning.state_bytes import state_bytes
from megaforge.verification.dry_run import check_samples, check_sharding, held_bytes, try_ranks
from tests.training.tiny import arguments, make_trainer, write_dataset

TEST_MODEL = ["--config", "cdrmix-test", "--vocab-size", "500"]


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--fp64"]])
def test_plan_equals_a_real_run(tmp_path: Path, precision: list[str]) -> None:
    prefix = write_dataset(tmp_path / "d_text_document", documents=20)
    trainer = make_trainer(arguments(prefix, "--train-iters", "1", *precision))
    trainer.train()
    dtype = trainer.model.embedding.weight.dtype
    layout = planned_layout(trainer.config, 1)
    assert layout.dtype == dtype
    parts = model_parts(trainer.config.model, dtype)
    whole = [StagePart(range(len(parts.blocks)), True, True)]
    assert state_bytes(parts, whole, layout, layout.context()) == held_bytes(trainer.model, trainer.optimizer)


@pytest.mark.parametrize(
    "sizes",
    [{"tp": 2}, {"tp": 4, "etp": 2, "ep": 2}, {"ep": 4}, {"tp": 2, "ep": 4, "etp": 1, "cp": 2}],
    ids=str,
)
def test_plan_equals_the_model_built_at_the_layout(sizes: dict[str, int]) -> None:
    config = parse_config(TEST_MODEL).config
    layout = PlannedLayout(8, **({"etp": sizes.get("tp", 1)} | sizes), dtype=torch.bfloat16)
    parts = model_parts(config.model, torch.bfloat16)
    whole = [StagePart(range(len(parts.blocks)), True, True)]
    for rank in range(8):
        ctx = ParallelContext.of_rank(rank, 8, device="meta", **sizes)
        model = HybridModel(make_layer_context(config.model, ctx, dtype=torch.bfloat16))
        built = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        assert state_bytes(parts, whole, layout, ctx).parameters == built


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--tp 2 --sp --recompute selective",
        "--tp 4 --bf16 --ep 2",
        "--pp 2 --bf16 --zero 1 --ep 2 --recompute moe",
        "--pp 4 --tp 2 --sp --recompute full",
        "--pp 2 --vpp 2 --tp 2",
        "--pp 2 --pipeline-schedule zb-v --bf16 --recompute selective",
        "--cp 2 --cp-comm-type p2p --pp 2 --pipeline-schedule zb-h1",
        "--pp 2 --pipeline-schedule zb-h1 --recompute full",
        "--pp 2 --zero 2 --vpp 2",
        "--pp 2 --zero 1 --bf16 --ema-decay 0.9",
        "--zero 1 --optimizer normuon --ep 4",
        "--pp 2 --zero 2 --bf16 --optimizer normuon --tp 2 --grokfast ema",
        "--ema-decay 0.9",
        "--pp 2 --vpp 2 --tp 2 --cpu-offload-activations",
    ],
)
def test_plan_equals_the_dry_run(flags: str) -> None:
    """The stages that training builds: v_first and tied matrices, and what each keeps for its backward pass."""
    batch = ["--global-batch-size", "16", "--micro-batch-size", "1", "--seq-length", "256", "--rwkv-init", "normal"]
    config = parse_config([*TEST_MODEL, *batch, "--hidden-size", "256", *flags.split()]).config
    layout, ranks = try_ranks(config, 8)
    assert sum(len(rank.stands_for) for rank in ranks) == layout.pp
    for rank in ranks:
        assert rank.state == rank.planned
        assert rank.planned_activations == pytest.approx(rank.activations, rel=0.001)


def test_a_tied_matrix_is_held_by_both_ends_of_a_pipeline_but_once_by_a_v() -> None:
    config = parse_config([*TEST_MODEL, "--global-batch-size", "8", "--micro-batch-size", "1"]).config
    parts = model_parts(config.model, torch.float32)
    vocabulary = 512 * 64

    def elements(**pipeline: int | str) -> int:
        layout = dataclasses.replace(planned_layout(config, 4), **pipeline)
        stages = cut_stages(parts, layout)
        return sum(rank_memory(parts, layout, stages, rank).state.elements for rank in range(layout.pp))

    alone = elements()
    assert elements(pp=2) == alone + vocabulary
    assert elements(pp=2, vpp=2, schedule_name="zb-v") == alone


def test_shards_that_overlap_are_found() -> None:
    config = parse_config(TEST_MODEL).config
    parts = model_parts(config.model, torch.float32)
    layout = PlannedLayout(8, tp=2, ep=2, etp=2, dtype=torch.float32)
    check_sharding(parts, layout)
    (held, *others), ffn = parts.blocks[0].held
    broken = dataclasses.replace(held, spec=dataclasses.replace(held.spec, tp_partial_grad=False, shard_dim=0))
    object.__setattr__(broken.spec, "pieces", lambda ctx: held.spec.pieces(layout.context(0)))
    blocks = (dataclasses.replace(parts.blocks[0], held=((broken, *others), ffn)), *parts.blocks[1:])
    with pytest.raises(RuntimeError, match="distinct"):
        check_sharding(dataclasses.replace(parts, blocks=blocks), layout)


def test_samples_are_shared_out_once() -> None:
    check_samples(PlannedLayout(8, tp=2, global_batch_size=16, micro_batch_size=2))


def test_zero_shares_out_what_it_says() -> None:
    config = parse_config(TEST_MODEL).config
    parts = model_parts(config.model, torch.bfloat16)
    everything = [StagePart(range(len(parts.blocks)), True, True)]
    whole = stage_parameters(parts, everything)
    states = [
        state_bytes(parts, everything, layout)
        for layout in (PlannedLayout(8, ep=2, zero=zero, global_batch_size=8) for zero in (0, 1, 2))
    ]
    experts = sum(held.spec.numel * count for held, count in whole if held.spec.expert_dim is not None)
    dense = sum(held.spec.numel * count for held, count in whole if held.spec.expert_dim is None)
    assert states[1].parameters == states[2].parameters == pytest.approx(states[0].parameters, rel=2e-3)
    assert states[0].gradients == states[1].gradients == pytest.approx(4 * (dense + experts // 2), rel=1e-3)
    assert states[2].gradients == pytest.approx(4 * (dense / 8 + experts / 2 / 4), rel=2e-3)
    narrow = sum(h.spec.numel * count for h, count in whole if h.spec.expert_dim is None and h.element_size == 2)
    shared = (12 * narrow + 8 * (dense - narrow)) / 8 + 12 * experts / 2 / 4
    assert states[1].optimizer == states[2].optimizer == pytest.approx(shared, rel=2e-3)
