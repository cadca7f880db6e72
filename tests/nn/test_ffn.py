"""Dense FFN and channel mix against written-out fp64 forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.config.schema import settings
from megaforge.nn.activations import ACTIVATIONS
from megaforge.nn.mlp import DenseFFN, FFNState
from megaforge.nn.moe import MoEFFN
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import named_specs
from tests.nn.support import assert_agrees, assert_close, filled, layer_context, random

LENGTH, BATCH, HIDDEN, INNER, EXPERTS, TOPK = 7, 2, 8, 10, 5, 2
CPU = torch.device("cpu")


def config(**changes: object) -> ModelConfig:
    settings = {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "num_experts": EXPERTS, "moe_router_topk": TOPK}
    return ModelConfig(num_attention_heads=2, rwkv_head_size=4, **{**settings, **changes})  # type: ignore[arg-type]


def build(kind: type, cfg: ModelConfig, channel_mix: bool, dtype: torch.dtype = torch.float64):
    return filled(kind(layer_context(cfg, dtype, index=1, count=4, token_shift=channel_mix)), "f")


def packed_info() -> PackedSequence:
    start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    start[0, 2], start[1, 5] = True, True
    return PackedSequence(BATCH, LENGTH, CPU, start)


def nonlinearity(kind: str, x: Tensor) -> Tensor:
    if kind == "swiglu":
        half = x.shape[-1] // 2
        return x[..., :half] * torch.sigmoid(x[..., :half]) * x[..., half:]
    if kind == "gated_relu2":
        gate, up = x.tensor_split(2, dim=-1)
        return torch.where(gate > 0, gate * gate, 0) * up
    if kind == "gelu_exact":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if kind == "gelu":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return torch.where(x > 0, x * x, 0)


def mixed(x: Tensor, w: dict[str, Tensor], info: PackedSequence) -> Tensor:
    """The channel mix, token by token."""
    rows = []
    for t in range(x.shape[0]):
        last = x[t - 1] * (~info.document_start_SB[t]).unsqueeze(-1) if t else torch.zeros_like(x[0])
        rows.append(x[t] + (last - x[t]) * w["f.x_k"])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "activation,bias,channel_mix",
    [
        ("relu2", False, True),
        ("swiglu", True, False),
        ("gelu", True, False),
        ("gelu_exact", False, False),
        ("gated_relu2", False, True),
    ],
)
def test_dense(activation: str, bias: bool, channel_mix: bool) -> None:
    module = build(DenseFFN, config(activation=activation, add_bias_linear=bias), channel_mix)
    info = packed_info()

    def oracle(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        x = mixed(x, w, info) if channel_mix else x
        inner = nonlinearity(activation, F.linear(x, w["f.up.weight"], w.get("f.up.bias")))
        return F.linear(inner, w["f.down.weight"], w.get("f.down.bias"))

    assert_agrees(module, lambda x: module(x, info).update, oracle, random(LENGTH, BATCH, HIDDEN))


def test_every_activation_that_the_flag_takes_is_there() -> None:
    assert tuple(ACTIVATIONS) == settings()["model.activation"].choices


def test_experts_of_another_width() -> None:
    """The shared expert has its own, and experts start as ones of that width do."""
    cfg = config(moe_ffn_hidden_size=6, moe_shared_expert_intermediate_size=4, activation="swiglu")
    shapes = {spec.name: spec.shape for spec, _ in named_specs(build(MoEFFN, cfg, False))}
    assert shapes["f.up.weight"] == (EXPERTS, 12, HIDDEN) and shapes["f.down.weight"] == (EXPERTS, HIDDEN, 6)
    assert shapes["f.shared_expert.up.weight"] == (8, HIDDEN)
    alone = {spec.name: p for spec, p in named_specs(build(MoEFFN, config(ffn_hidden_size=6), True))}
    for spec, parameter in named_specs(build(MoEFFN, config(moe_ffn_hidden_size=6), True)):
        assert torch.equal(parameter, alone[spec.name]), spec.name
    assert build(DenseFFN, config(moe_ffn_hidden_size=6), False).up.out_features == INNER


@torch.no_grad()
@pytest.mark.parametrize("kind", [DenseFFN, MoEFFN])
def test_shift_state_continues_the_parallel_form(kind: type) -> None:
    module = build(kind, config(), True)
    x = random(LENGTH, BATCH, HIDDEN)
    whole = module(x, PackedSequence(BATCH, LENGTH, CPU)).update
    state, outs, seen = FFNState(), [], 0
    for piece in x.split((3, 1, 2, 1)):
        info = PackedSequence(BATCH, piece.shape[0], CPU, None, seen)
        outs.append(module(piece, info, state=state).update)
        seen += piece.shape[0]
    assert_close(torch.cat(outs), whole, 1e-13, "output")
