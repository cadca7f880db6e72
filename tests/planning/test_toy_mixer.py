"""A mixer that the planner has never heard of is planned like any other: measured, not described."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.planning.costs import crossing_bytes, stage_cost
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.stages import StagePart, model_parts
from megaforge.registry import load_extensions
from megaforge.verification.dry_run import try_ranks
from tests.planning.test_costs import kept_by_autograd

TOKENS, WIDTH = 128, 64
MODEL = ["--config", "cdrmix-test", "--vocab-size", "500", "--seq-length", f"{TOKENS}", "--micro-batch-size", "1"]
MODEL += ["--hybrid-layer-pattern", "REGEG-*E", "--global-batch-size", "16"]
load_extensions((str(Path(__file__).parents[1] / "toys" / "running_mean.py"),))


def test_what_it_keeps_on_a_cpu_is_predicted() -> None:
    config = parse_config(MODEL).config
    layout = layout_of(config, 1)
    parts = model_parts(config.model, layout.dtype)
    whole = StagePart(range(len(parts.blocks)), True, True)
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(config.model, ctx, dtype=layout.dtype))
    initialize_parameters(model, ctx, 1)
    predicted = stage_cost(
        parts, PlannedLayout(1, sequence_length=TOKENS, dtype=torch.float32, device_type="cpu"), whole
    )
    assert predicted.kept == pytest.approx(kept_by_autograd(model, layout), rel=0.01)


@pytest.mark.parametrize(
    "flags",
    [
        "--tp 2 --sp --pp 2",
        "--pp 4 --recompute full",
        "--pp 2 --vpp 2 --recompute moe",
        "--pp 2 --pipeline-schedule zb-h1",
    ],
)
def test_stages_with_it_need_what_the_dry_run_measures(flags: str) -> None:
    _, ranks = try_ranks(parse_config([*MODEL, *flags.split()]).config, 8)
    for rank in ranks:
        assert rank.planned_activations == pytest.approx(rank.activations, rel=0.01)


def test_what_it_sends_and_carries_is_counted() -> None:
    config = parse_config(MODEL).config
    parts = model_parts(config.model, torch.float32)
    layout = PlannedLayout(8, tp=2, etp=2, sequence_length=TOKENS, dtype=torch.float32)
    inside = TOKENS * WIDTH * 4
    # The residual stream, and from R and G the half of a tensor each.
    assert crossing_bytes(parts, layout) == inside + 2 * inside / 2
    # Two sublayers, each an all-reduce forward and one backward; in a ring of two each sends half twice.
    assert stage_cost(parts, layout, StagePart(range(2, 3), False, False)).sent("tp") == pytest.approx(
        4 * inside, rel=0.01
    )
