"""Dense FFN, channel mix and mixture of experts against written-out fp64 forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.nn.mlp import DenseFFN, FFNState
from megaforge.nn.moe import MoEFFN, make_plan
from megaforge.nn.sequence import SequenceInfo
from megaforge.parallel.context import ParallelContext
from tests.nn.support import CTX, REGION, assert_agrees, assert_close, filled, random

LENGTH, BATCH, HIDDEN, INNER, EXPERTS, TOPK = 7, 2, 8, 10, 5, 2
CPU = torch.device("cpu")


def config(**changes: object) -> ModelConfig:
    settings = {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "num_experts": EXPERTS, "moe_router_topk": TOPK}
    return ModelConfig(num_attention_heads=2, **{**settings, **changes})  # type: ignore[arg-type]


def build(kind: type, cfg: ModelConfig, channel_mix: bool, dtype: torch.dtype = torch.float64):
    return filled(kind(CTX, "f", cfg, layer_index=1, num_layers=4, channel_mix=channel_mix, region=REGION, dtype=dtype))


def packed_info() -> SequenceInfo:
    start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    start[0, 2], start[1, 5] = True, True
    return SequenceInfo(BATCH, LENGTH, CPU, start)


def nonlinearity(kind: str, x: Tensor) -> Tensor:
    if kind == "swiglu":
        half = x.shape[-1] // 2
        return x[..., :half] * torch.sigmoid(x[..., :half]) * x[..., half:]
    if kind == "gelu":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return torch.where(x > 0, x * x, 0)


def mixed(x: Tensor, w: dict[str, Tensor], info: SequenceInfo) -> Tensor:
    """The channel mix, token by token."""
    rows = []
    for t in range(x.shape[0]):
        last = x[t - 1] * (~info.document_start_SB[t]).unsqueeze(-1) if t else torch.zeros_like(x[0])
        rows.append(x[t] + (last - x[t]) * w["f.x_k"])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "activation,bias,channel_mix", [("relu2", False, True), ("swiglu", True, False), ("gelu", True, False)]
)
def test_dense(activation: str, bias: bool, channel_mix: bool) -> None:
    module = build(DenseFFN, config(activation=activation, add_bias_linear=bias), channel_mix)
    info = packed_info()

    def oracle(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        x = mixed(x, w, info) if channel_mix else x
        inner = nonlinearity(activation, F.linear(x, w["f.up.weight"], w.get("f.up.bias")))
        return F.linear(inner, w["f.down.weight"], w.get("f.down.bias"))

    assert_agrees(module, lambda x: module(x, info), oracle, random(LENGTH, BATCH, HIDDEN))


@pytest.mark.parametrize("topk", [1, 2, EXPERTS])
@pytest.mark.parametrize("activation,channel_mix", [("relu2", True), ("swiglu", False)])
def test_experts_and_router_losses(activation: str, channel_mix: bool, topk: int) -> None:
    """One token at a time; the two losses enter the compared value, so their gradients are compared too."""
    module = build(MoEFFN, config(activation=activation, moe_router_topk=topk), channel_mix)
    info = packed_info()

    def run(x: Tensor) -> Tensor:
        out, losses = module(x, info)
        return torch.cat([out.flatten(), losses.load_balance_sum.view(1), losses.z_loss_sum.view(1)])

    def oracle(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        x = mixed(x, w, info) if channel_mix else x
        outs, balance, z_loss = torch.zeros_like(x), torch.zeros(()), torch.zeros(())
        for b in range(BATCH):
            share, probability = torch.zeros(EXPERTS, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
            for t in range(LENGTH):
                logits = w["f.router.weight"] @ x[t, b]
                everyone = logits.softmax(dim=0)
                chosen = sorted(range(EXPERTS), key=lambda e: -float(everyone[e].detach()))[:topk]
                total = sum(everyone[e] for e in chosen)
                for e in chosen:
                    inner = nonlinearity(activation, w["f.up.weight"][e] @ x[t, b])
                    outs[t, b] = outs[t, b] + everyone[e] / total * (w["f.down.weight"][e] @ inner)
                    share[e] += 1 / (topk * LENGTH)
                probability = probability + everyone / LENGTH
                z_loss = z_loss + logits.exp().sum().log() ** 2
            balance = balance + EXPERTS * (share * probability).sum()
        return torch.cat([outs.flatten(), balance.view(1), z_loss.view(1)])

    assert_agrees(module, run, oracle, random(LENGTH, BATCH, HIDDEN))


def test_counts_and_idle_experts() -> None:
    """All tokens to expert 3: the others' gradients are zero, not missing, and balance is at its worst."""
    module = build(MoEFFN, config(moe_router_topk=1), False)
    with torch.no_grad():
        module.router.weight.zero_()[3] = 1.0
    out, losses = module(random(LENGTH, BATCH, HIDDEN).abs(), SequenceInfo(BATCH, LENGTH, CPU))
    assert losses.tokens_per_expert.tolist() == [0, 0, 0, LENGTH * BATCH, 0]
    assert float(losses.load_balance_sum) > BATCH * 2
    out.sum().backward()
    assert module.up.grad is not None
    assert [bool(g.any()) for g in module.up.grad] == [False, False, False, True, False]


def test_balance_loss_is_one_a_sequence_when_balanced() -> None:
    module = build(MoEFFN, config(), False)
    with torch.no_grad():
        module.router.weight.zero_()
    _, losses = module(random(LENGTH, BATCH, HIDDEN), SequenceInfo(BATCH, LENGTH, CPU))
    assert abs(float(losses.load_balance_sum) - BATCH) < 1e-12
    assert abs(float(losses.z_loss_sum) - LENGTH * BATCH * math.log(EXPERTS) ** 2) < 1e-9


def test_dispatch_order_is_stable() -> None:
    experts = torch.tensor([[1, 0], [0, 2], [1, 2]])
    plan = make_plan(experts, torch.bincount(experts.flatten(), minlength=3))
    assert plan.counts == (2, 2, 2)
    assert plan.token.tolist() == [0, 1, 0, 2, 1, 2]
    assert plan.order[plan.position].tolist() == list(range(6))


def test_router_stays_in_fp32() -> None:
    module = build(MoEFFN, config(), True, torch.bfloat16)
    assert module.router.weight.dtype == torch.float32 and module.up.dtype == torch.bfloat16
    x = random(LENGTH, BATCH, HIDDEN).bfloat16()
    weights, _, _ = module.router(x)
    assert weights.dtype == torch.float32
    out, _ = module(x, packed_info())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert module.router.weight.grad is not None and bool(module.router.weight.grad.any())


@torch.no_grad()
@pytest.mark.parametrize("kind", [DenseFFN, MoEFFN])
def test_shift_state_continues_the_parallel_form(kind: type) -> None:
    module = build(kind, config(), True)
    x = random(LENGTH, BATCH, HIDDEN)
    first = (lambda result: result[0]) if kind is MoEFFN else (lambda result: result)
    whole = first(module(x, SequenceInfo(BATCH, LENGTH, CPU)))
    state, outs, seen = FFNState(), [], 0
    for piece in x.split((3, 1, 2, 1)):
        outs.append(first(module(piece, SequenceInfo(BATCH, piece.shape[0], CPU, None, seen), state)))
        seen += piece.shape[0]
    assert_close(torch.cat(outs), whole, 1e-13, "output")


def test_expert_width_that_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match="--ffn-hidden-size 10 does not divide by --tp 4"):
        MoEFFN(
            ParallelContext.of_rank(0, 4, tp=4),
            "f",
            config(),
            layer_index=0,
            num_layers=1,
            channel_mix=False,
            region=REGION,
            dtype=torch.float32,
        )
