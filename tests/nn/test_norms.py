"""Norms against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.nn.norms import LayerNorm, RMSNorm
from tests.nn.support import assert_agrees, assert_close, filled, layer_context, random

SIZE, EPSILON = 24, 1e-3
CFG = ModelConfig(hidden_size=SIZE, norm_epsilon=EPSILON)


def rms(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return F.rms_norm(x, (SIZE,), w["n.weight"], EPSILON)


def layer(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return F.layer_norm(x, (SIZE,), w["n.weight"], w["n.bias"], EPSILON)


@pytest.mark.parametrize("kind,oracle", [(RMSNorm, rms), (LayerNorm, layer)])
def test_values_and_gradients(kind, oracle) -> None:
    norm = filled(kind(layer_context(CFG)), "n")
    assert_agrees(norm, norm, oracle, random(5, 3, SIZE))


@pytest.mark.parametrize("kind,oracle", [(RMSNorm, rms), (LayerNorm, layer)])
def test_bf16_input_is_normed_in_fp32(kind, oracle) -> None:
    norm = filled(kind(layer_context(CFG, torch.bfloat16)), "n")
    assert norm.weight.dtype == torch.float32
    x = random(5, 3, SIZE).bfloat16()
    out = norm(x)
    weights = {f"n.{name}": p.detach().double() for name, p in norm.named_parameters()}
    assert out.dtype == torch.bfloat16
    assert_close(out, oracle(x.double(), weights), 3e-3, "output")  # one rounding to 8 bits
