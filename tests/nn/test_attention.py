"""Attention against a written-out fp64 form: loops over batch and heads, RoPE by complex rotation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.nn.attention import KVCache, SelfAttention
from megaforge.parallel.packed_sequence import PackedSequence
from tests.kernels.test_attention import fake_varlen
from tests.nn.support import assert_agrees, assert_close, filled, layer_context, random

LENGTH, BATCH, HIDDEN, HEADS = 7, 2, 24, 4
CPU = torch.device("cpu")


def config(**changes: object) -> ModelConfig:
    return ModelConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, **changes)  # type: ignore[arg-type]


def attention(cfg: ModelConfig, dtype: torch.dtype = torch.float64) -> SelfAttention:
    return filled(SelfAttention(layer_context(cfg, dtype, count=3)), "a")


def rotate(x: Tensor, positions: Tensor, channels: int, base: float) -> Tensor:
    """[s, d]: channel pairs (i, i + channels/2) as complex numbers times exp(i position base^(-2i/channels))."""
    half = channels // 2
    angle = positions[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:, :half], x[:, half:channels]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[:, channels:]], dim=1)


def oracle_of(cfg: ModelConfig, info: PackedSequence):
    """One sequence and one head at a time."""

    def oracle(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        d, groups = cfg.head_dim, cfg.query_groups
        bias = w.get("a.qkv.bias", torch.zeros(w["a.qkv.weight"].shape[0], dtype=torch.float64))
        q, k, v = (x @ w["a.qkv.weight"].T + bias).split((HEADS * d, groups * d, groups * d), dim=-1)
        rows = []
        for b in range(x.shape[1]):
            outs = []
            for h in range(HEADS):
                g = h * groups // HEADS
                query, key, value = (
                    q[:, b, h * d : (h + 1) * d],
                    k[:, b, g * d : (g + 1) * d],
                    v[:, b, g * d : (g + 1) * d],
                )
                if cfg.position_embedding_type == "rope":
                    turned = int(d * cfg.rotary_percent) // 2 * 2
                    query = rotate(query, info.position_ids_BS[b], turned, cfg.rotary_base)
                    key = rotate(key, info.position_ids_BS[b], turned, cfg.rotary_base)
                scores = query @ key.T / math.sqrt(d)
                documents = info.document_ids_BS[b]
                hidden = (documents[:, None] != documents[None, :]) | ~torch.ones_like(scores, dtype=torch.bool).tril()
                outs.append(scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ value)
            rows.append(torch.cat(outs, dim=-1))
        return torch.stack(rows, dim=1) @ w["a.output.weight"].T + w.get(
            "a.output.bias", torch.zeros(1, dtype=torch.float64)
        )

    return oracle


@pytest.mark.parametrize("groups", [None, 2])
def test_documents_take_the_place_of_the_mask(monkeypatch: pytest.MonkeyPatch, groups: int | None) -> None:
    """The path of a GPU, with a stand-in for its kernel."""
    function, calls = fake_varlen("window_size")
    monkeypatch.setattr("megaforge.kernels.attention._VARLEN", function)
    monkeypatch.setattr("megaforge.nn.attention.takes_documents", lambda query: True)
    start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    start[0, [2, 3]] = start[1, 5] = True
    info, cfg = PackedSequence(BATCH, LENGTH, CPU, start), config(num_query_groups=groups)
    layer = attention(cfg)
    assert_agrees(layer, lambda x: layer(x, info).update, oracle_of(cfg, info), random(LENGTH, BATCH, HIDDEN))
    assert [call["bounds"] for call in calls] == [[0, 2, 3, 7, 12, 14]]
    assert info._mask is None  # b * s * s entries that nobody needs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2, "add_bias_linear": True},
        {"num_query_groups": 1, "rotary_percent": 0.5, "rotary_base": 100.0},
        {"position_embedding_type": "none", "kv_channels": 10},
    ],
)
def test_values_and_gradients(changes: dict, packed: bool) -> None:
    cfg = config(**changes)
    start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    start[0, 2], start[0, 3], start[1, 5] = packed, packed, packed
    info = PackedSequence(BATCH, LENGTH, CPU, start)
    module = attention(cfg)
    assert_agrees(module, lambda x: module(x, info).update, oracle_of(cfg, info), random(LENGTH, BATCH, HIDDEN))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1, 1), (4, 1, 1, 1), (3, 4)])
def test_cache_continues_the_parallel_form(cuts: tuple[int, ...]) -> None:
    module = attention(config(num_query_groups=2))
    x = random(LENGTH, BATCH, HIDDEN)
    whole = module(x, PackedSequence(BATCH, LENGTH, CPU)).update
    cache, outs, seen = KVCache(), [], 0
    for piece in x.split(cuts):
        info = PackedSequence(BATCH, piece.shape[0], CPU, None, seen)
        outs.append(module(piece, info, state=cache).update)
        seen += piece.shape[0]
    assert cache.length == LENGTH
    assert_close(torch.cat(outs), whole, 1e-13, "output")


@torch.no_grad()
def test_cache_grows_beyond_its_first_capacity() -> None:
    module = attention(config())
    x = random(150, 1, HIDDEN)
    whole = module(x, PackedSequence(1, 150, CPU)).update
    cache = KVCache()
    infos = [PackedSequence(1, 50, CPU, None, offset) for offset in (0, 50, 100)]
    pieces = [module(x, info, state=cache).update for x, info in zip(x.split(50), infos, strict=True)]
    assert_close(torch.cat(pieces), whole, 1e-13, "output")
