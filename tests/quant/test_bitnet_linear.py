"""Quantized layers in a plain PyTorch model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from megaforge.errors import UserError
from megaforge.quant import BitNetLinear, convert_model_to_bitnet
from megaforge.quant.quantizers import quantize_weight


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 4, bias=False), nn.Bilinear(4, 4, 2)))


def test_weights_and_biases_are_kept_and_the_report_names_all() -> None:
    model = plain_model()
    first, second = model[0], model[2][0]
    report = convert_model_to_bitnet(model, ["2.*"], weights="ternary")
    assert report.converted == {"2.0": "ternary, activations int8"} and report.kept == {"0": "not named"}
    assert str(report) == "2.0: ternary, activations int8; 0: not named"
    assert model[0] is first and isinstance(model[2][0], BitNetLinear)
    assert model[2][0].weight is second.weight and model[2][0].bias is None
    assert "weights=ternary, activation_bits=8" in repr(model[2][0])
    again = convert_model_to_bitnet(model, "all", activation_bits=None)
    assert again.converted == {"0": "binary, activations as they are"}
    assert again.kept == {"2.0": "a BitNetLinear, not a plain nn.Linear"}
    assert model[0].bias is first.bias
    state = plain_model().state_dict()
    model.load_state_dict(state)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_the_product_follows_every_change_of_the_weights() -> None:
    layer = BitNetLinear(8, 3, weights="ternary", activation_bits=None)
    x = torch.eye(8)
    for factor in (1.0, -3.0):
        with torch.no_grad():
            layer.weight.mul_(factor)
        codes, step = quantize_weight(layer.weight.detach(), "ternary")
        torch.testing.assert_close(layer(x), (codes * step).t() + layer.bias)
    copied = copy.deepcopy(layer)
    copied.eval()
    assert copied.op.layer is copied and layer.training


@pytest.mark.parametrize("weights", ["binary", "ternary"])
def test_it_learns_in_fp16_with_loss_scaling(weights: str) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    convert_model_to_bitnet(model, weights=weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 8, generator=generator)
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(x)
        assert out.dtype == torch.float16
        loss = (out.float().squeeze(1) - x[:, :4].sum(1)).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert model[0].weight.dtype == torch.float32
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(UserError, match="'3' names no linear layer; there are 0, 2.0"):
        convert_model_to_bitnet(plain_model(), ["0", "3"])
    with pytest.raises(UserError, match="a single nn.Linear"):
        convert_model_to_bitnet(nn.Linear(2, 2))
