"""RWKV-7's fused arithmetic on a GPU: its cases, and a whole layer with and without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megaforge.config.model_config import ModelConfig
from megaforge.kernels import rwkv7_fused
from megaforge.kernels.native import triton_kernels
from megaforge.nn.rwkv7 import RWKV7TimeMix
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or triton_kernels("rwkv7_fused")[0] is None, reason="needs a GPU and Triton"
)

if torch.cuda.is_available():
    from tests.kernels.rwkv7_fused_cases import *  # noqa: F403


def layer_results(fused: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    monkeypatch.setattr(rwkv7_fused, "fused", lambda x: fused)
    ctx = ParallelContext.single("cuda")
    layer = RWKV7TimeMix(replace(make_layer_context(ModelConfig(hidden_size=128), ctx), count=2))
    name_parameters(layer)
    initialize_parameters(layer, ctx, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():  # many begin at zero, which would hide their gradients' readers
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    x = torch.randn(50, 2, 128, generator=generator).cuda().requires_grad_()
    starts = torch.zeros(2, 50, dtype=torch.bool)
    starts[0, [7, 30]] = True
    out, made, _ = layer(x, PackedSequence(2, 50, x.device, starts))
    v_first = made["v_first"]
    grads = torch.autograd.grad(out.square().sum() + v_first.sum(), [x, *layer.parameters()])
    return [out, *grads]


def test_a_layer_computes_the_same_fused_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for ours, expected in zip(layer_results(True, monkeypatch), layer_results(False, monkeypatch), strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm()
