"""What a plan says of quantized matrices: their codes are state, no activation, and may travel in their place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.planning.communication import gradient_traffic
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stage_run import run_stage
from megaforge.planning.stages import cut_stages, model_parts, stage_parameters
from megaforge.planning.state_bytes import state_bytes

CFG = ModelConfig(hybrid_layer_pattern="*-", hidden_size=64, num_attention_heads=4, vocab_size=128)
TERNARY = replace(CFG, quantize_weights="ternary")
LAYOUT = PlannedLayout(8, zero=1, global_batch_size=8, sequence_length=16)


def test_codes_are_state_and_may_travel() -> None:
    plain, parts = model_parts(CFG, torch.bfloat16), model_parts(TERNARY, torch.bfloat16)
    stages = cut_stages(parts, LAYOUT)
    held = stage_parameters(parts, stages)
    quantized = sum(copies * math.prod(item.spec.shape) for item, copies in held if item.spec.quantized)
    assert quantized > 4 * 64 * 64
    sent = [gradient_traffic(held, layout) for layout in (LAYOUT, replace(LAYOUT, code_bits=2))]
    assert sent[0].gathered - sent[1].gathered == pytest.approx(quantized * (2 - 0.25) * 7 / 8)
    assert sent[0].reduced == sent[1].reduced
    kept = [state_bytes(one, stages, LAYOUT).parameters for one in (plain, parts)]
    assert kept[1] - kept[0] == quantized
    assert "--zero-quantized-gather" in replace(LAYOUT, code_bits=2).describe()


def test_codes_are_no_activations() -> None:
    chunk = HybridModel(make_layer_context(TERNARY, ParallelContext.single("meta"), dtype=torch.bfloat16))
    first, second = (run_stage(chunk, LAYOUT) for _ in range(2))
    assert first == second and first.kept > 0
