"""Ranges of activations as a layer watches them, and the steps that are made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.quant.linear import QuantizedLinear
from megaforge.quant.quantizers import activation_codes, activation_range, activation_values
from megaforge.quant.statistics import quantized_layers


def op_of(**more: Any) -> QuantizedLinear:
    shape: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 8}
    cfg, ctx = ModelConfig(**shape, layer_schedule="attention", ffn="dense", **more), ParallelContext.single()
    model = HybridModel(make_layer_context(cfg, ctx))
    initialize_parameters(model, ctx, seed=0)
    return quantized_layers(model)[0][2]


CASES = {
    "some": torch.linspace(-3, 2, 48).view(3, 16),
    "one token": torch.linspace(-1, 2, 16).view(1, 16),
    "zeros": torch.zeros(2, 16),
    "alike": torch.full((2, 16), 0.3),
    "large": torch.linspace(-1e30, 1e30, 16).view(1, 16),
    "positive": torch.linspace(0, 2, 16).view(1, 16),
}


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_static_step_is_that_of_the_largest_value(case: str, asymmetric: bool) -> None:
    """Of one that a token had of its own; and a clip cuts it short."""
    x = CASES[case]
    op = op_of(
        quantize_weights="ternary", asymmetric_activations=asymmetric, online_calibration=True, quant_clip="both"
    )
    ranges = op.ranges
    assert ranges is not None and ranges.input is not None and ranges.clip is not None and op.activations is not None
    assert all(torch.equal(one, other) for one, other in zip(op.encode(x, None), plain(op, x), strict=True))
    ranges.watches = True
    for part in (x[:1], x[1:]):
        op.encode(part, None)
    assert ranges.seen is not None
    expected = torch.stack((x.max(), -x.min())).clamp_min(0) if asymmetric else x.abs().max().view(1)
    assert torch.equal(ranges.seen, expected)
    with torch.no_grad():
        ranges.input.copy_(ranges.seen)
        ranges.clip[1] = 0.5
    codes, step = op.encode(x, None)
    assert (codes.shape, step.shape[:-1]) == (x.shape, x.shape[:-1]) and (case == "zeros" or ranges.has_input)
    ours, whole = activation_codes(x, 0.5 * expected.expand(len(x), -1), op.activations)
    if case != "zeros":  # nothing is known of them: they have steps of their own
        assert torch.equal(codes, ours) and torch.equal(step, whole)
    inside = x.clamp(-0.5 * expected[-1], 0.5 * expected[0])
    assert ((activation_values(codes, step) - inside).abs() <= 1.01 * step[..., :1]).all()


def plain(op: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    assert op.activations is not None
    return activation_codes(x, activation_range(x, op.activations), op.activations)


def test_nothing_and_no_number() -> None:
    op = op_of(quantize_weights="ternary", online_calibration=True)
    assert op.ranges is not None
    op.ranges.watches = True
    op.encode(torch.zeros(0, 16), None)
    assert op.ranges.seen is None
    op.encode(torch.full((1, 16), torch.nan), None)
    assert op.ranges.seen is not None and op.ranges.seen.isinf().all()  # which no average takes in
    op.layer.eval()
    op.ranges.seen = None
    op.encode(torch.ones(1, 16), None)
    assert op.ranges.seen is None


@pytest.mark.parametrize("kind", ["binary", "ternary", "int4", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_clip_of_weights_is_a_factor_on_their_steps(kind: str, granularity: str) -> None:
    """And signs are taken beside the same mean."""
    op = op_of(quantize_weights=kind, quant_granularity=granularity, quant_clip="weights")
    weight = op.layer.weight.detach()  # type: ignore[union-attr]
    before, whole = op.codes(weight)
    assert op.ranges is not None and op.ranges.clip is not None and op.ranges.input is None
    with torch.no_grad():
        op.ranges.clip[0] = 0.5
    op.forget()
    codes, scale = op.codes(weight)
    torch.testing.assert_close(scale.step, 0.5 * whole.step, rtol=1e-6, atol=0)
    if kind == "binary":
        assert torch.equal(codes, before) and torch.equal(scale.shift, whole.shift)  # type: ignore[arg-type]
    else:
        assert not torch.equal(codes, before)
