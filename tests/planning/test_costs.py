"""Predicted activation bytes against what autograd really keeps on a CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.config.pattern import ahead_of
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.planning.costs import block_costs, stage_cost
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.measured_activations import CASES, compare
from megaforge.planning.memory import peak_activations
from megaforge.planning.stage_run import run_stage
from megaforge.planning.stages import StagePart, cut_stages, model_parts


def kept_by_autograd(model: HybridModel, layout: PlannedLayout) -> int:
    """Bytes of the distinct storages that autograd saves for one micro-batch, parameters not counted."""
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 500, (layout.micro_batch_size, layout.sequence_length))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mask = torch.ones(tokens.shape)
        output, _ = model.run_stage(tokens, tokens, mask, None, [(tokens, mask)] * len(ahead_of(model.cfg)))
        total = output.loss_sum + sum(term.sum for term in output.terms.values())
    size = sum(saved.values())
    total.backward()
    return size


BASE = ["--config", "cdrmix-test", "--vocab-size", "500", "--seq-length", "128"]


@pytest.mark.parametrize("case", CASES)
def test_prediction_is_what_a_cpu_keeps(case: str) -> None:
    found = compare(CASES[case])
    print(f"{case}: predicted {found.predicted:,.0f}, kept {found.measured:,} bytes, error {found.error:+.2%}")
    assert abs(found.error) < 0.001


@pytest.mark.parametrize("case", [case for case in CASES if "tiny" not in case])
def test_what_is_alive_is_what_autograd_saves(case: str) -> None:
    config = parse_config(CASES[case]).config
    layout = layout_of(config, 1)
    model = HybridModel(make_layer_context(config.model, ParallelContext.single(), dtype=layout.dtype))
    initialize_parameters(model, ParallelContext.single(), 1)
    assert compare(CASES[case]).measured == pytest.approx(kept_by_autograd(model, layout), rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_the_meta_device_shows_what_a_gpu_would_keep(case: str) -> None:
    config = parse_config(CASES[case]).config
    layout = layout_of(config, 1)
    model = HybridModel(
        make_layer_context(
            config.model,
            ParallelContext.single("meta"),
            dtype=layout.dtype,
            recompute=layout.recompute,
            sequence_checkpoint=layout.sequence_checkpoint,
        )
    )
    parts = model_parts(config.model, layout.dtype)
    whole = StagePart(range(len(parts.blocks)), True, True)
    measured = run_stage(model, layout)
    assert stage_cost(parts, layout, whole).kept == pytest.approx(measured.kept, rel=0.001)
    assert measured.peak > measured.kept


@pytest.mark.parametrize(
    "case", ["hybrid MoE, bf16", "cdrmix-tiny, --recompute selective", "cdrmix-tiny, --recompute full"]
)
def test_what_goes_to_host_memory_leaves_the_device(case: str) -> None:
    config = parse_config(CASES[case]).config
    plain = layout_of(config, 1)
    layout = dataclasses.replace(plain, offload=True)
    ctx = ParallelContext.single("meta")
    model = HybridModel(make_layer_context(config.model, ctx, dtype=layout.dtype, recompute=layout.recompute))
    parts = model_parts(config.model, layout.dtype)
    whole = StagePart(range(len(parts.blocks)), True, True)
    cost, kept, measured = (
        stage_cost(parts, layout, whole),
        stage_cost(parts, plain, whole).kept,
        run_stage(model, layout),
    )
    assert cost.host == pytest.approx(measured.host, rel=0.05) and cost.host > 0.9 * kept
    assert cost.kept == pytest.approx(measured.kept, abs=0.001 * kept) and cost.kept < 0.1 * kept
    assert cost.kept + cost.working == pytest.approx(measured.peak, rel=0.1), "what is brought back is there again"
    assert run_stage(model, plain).host == stage_cost(parts, plain, whole).host == 0


def test_recomputation_keeps_less_and_brings_back_the_difference() -> None:
    config = parse_config(BASE).config
    parts = model_parts(config.model, torch.bfloat16)
    plain = PlannedLayout(1, sequence_length=128)
    kept, needed = {}, {}
    for recompute in ("none", "selective", "moe", "full"):
        costs = block_costs(parts, dataclasses.replace(plain, recompute=recompute), 1)
        kept[recompute] = sum(cost.kept for cost in costs)
        needed[recompute] = kept[recompute] + max(cost.working for cost in costs)
    assert kept["full"] == 128 * 64 * 2
    assert kept["full"] < kept["selective"] < kept["none"]
    assert kept["full"] < kept["moe"] < kept["none"]


def test_live_activations_follow_the_schedule() -> None:
    sizes = [3.0, 5.0, 7.0, 11.0]
    one = build_schedule("1f1b", pp=4, vpp=1, microbatches=8)
    assert [peak_activations(one, rank, sizes) for rank in range(4)] == [(12.0, 4), (15.0, 3), (14.0, 2), (11.0, 1)]
    # The weight half of a backward pass needs the activations, so they live until it is done.
    split = build_schedule("zb-h1", pp=4, vpp=1, microbatches=8)
    assert [peak_activations(split, rank, sizes)[1] for rank in range(4)] == [4, 4, 4, 4]
    # So does what the input half computes again for it: of rank + 1 micro-batches, the later ranks' halves being apart.
    again = [peak_activations(split, rank, sizes, [100.0] * 4)[0] for rank in range(4)]
    assert again == [4 * size + 100 * (rank + 1) for rank, size in enumerate(sizes)]
    everything = build_schedule("gpipe", pp=4, vpp=1, microbatches=8)
    assert peak_activations(everything, 2, sizes) == (56.0, 8)


def test_stages_are_cut_by_arithmetic() -> None:
    config = parse_config(["--config", "cdrmix-core-1b"]).config
    parts = model_parts(config.model, torch.bfloat16)
    layout = PlannedLayout(4, pp=4, global_batch_size=4, sequence_length=2048)
    stages = cut_stages(parts, layout)
    assert [block for stage in stages for block in stage.blocks] == list(range(24))
    assert len(stages[-1].blocks) < max(len(stage.blocks) for stage in stages)  # the head takes its share
