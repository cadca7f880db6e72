"""Attention against a written-out fp64 form (loops over batch and heads, RoPE by complex rotation) and against
transformers' Qwen 3."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaforge.config.model_config import ModelConfig
from megaforge.kernels.attention import attention_gradients, attention_with_lse, causal_attention, native
from megaforge.kernels.attention.fused import takes_fused
from megaforge.nn.attention import KVCache, SelfAttention
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import named_specs
from tests.nn.support import assert_agrees, assert_close, filled, layer_context, random

LENGTH, BATCH, HIDDEN, HEADS = 7, 2, 24, 4
CPU = torch.device("cpu")


def config(**changes: object) -> ModelConfig:
    return ModelConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, **changes)  # type: ignore[arg-type]


def attention(cfg: ModelConfig, dtype: torch.dtype = torch.float64) -> SelfAttention:
    return filled(SelfAttention(layer_context(cfg, dtype, count=3)), "a")


def rotate(x: Tensor, positions: Tensor, cfg: ModelConfig) -> Tensor:
    """[s, d]: channel pairs (i, i + channels/2), or neighbours, as complex numbers times
    exp(i position base^(-2i/channels)); neighbours stay neighbours."""
    channels = int(x.shape[1] * cfg.rotary_percent) // 2 * 2
    half = channels // 2
    pairs = torch.stack([x[:, :half], x[:, half:channels]], -1)
    if cfg.rotary_interleaved:
        pairs = x[:, :channels].view(-1, half, 2)
    angle = positions.double()[:, None] / (cfg.rotary_seq_len_interpolation_factor or 1)
    angle = angle * cfg.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angle))
    whole = turned.flatten(1) if cfg.rotary_interleaved else turned.transpose(1, 2).flatten(1)
    return torch.cat([whole, x[:, channels:]], dim=1)


def head_norm(x: Tensor, w: dict[str, Tensor], name: str, cfg: ModelConfig) -> Tensor:
    if not cfg.qk_layernorm:
        return x
    weight, size = w[f"a.{name}.weight"], (x.shape[1],)
    if cfg.normalization == "layernorm":
        return F.layer_norm(x, size, weight, w[f"a.{name}.bias"], cfg.norm_epsilon)
    return F.rms_norm(x, size, weight, cfg.norm_epsilon)


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
                query = head_norm(query, w, "query_norm", cfg)
                key = head_norm(key, w, "key_norm", cfg)
                if cfg.position_embedding_type == "rope":
                    query, key = (rotate(x, info.position_ids_BS[b], cfg) for x in (query, key))
                scores = query @ key.T / math.sqrt(d)
                documents = info.document_ids_BS[b]
                hidden = (documents[:, None] != documents[None, :]) | ~torch.ones_like(scores, dtype=torch.bool).tril()
                outs.append(scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ value)
            rows.append(torch.cat(outs, dim=-1))
        return torch.stack(rows, dim=1) @ w["a.output.weight"].T + w.get(
            "a.output.bias", torch.zeros(1, dtype=torch.float64)
        )

    return oracle


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2, "add_bias_linear": True},
        {"num_query_groups": 1, "rotary_percent": 0.5, "rotary_base": 100.0},
        {"position_embedding_type": "none", "kv_channels": 10},
        {"qk_layernorm": True, "num_query_groups": 2, "add_qkv_bias": True, "rotary_interleaved": True},
        {
            "qk_layernorm": True,
            "normalization": "layernorm",
            "rotary_interleaved": True,
            "rotary_percent": 0.7,
            "rotary_seq_len_interpolation_factor": 3.0,
        },
    ],
)
def test_values_and_gradients(changes: dict, packed: bool) -> None:
    cfg = config(**changes)
    start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    start[0, 2], start[0, 3], start[1, 5] = packed, packed, packed
    info = PackedSequence(BATCH, LENGTH, CPU, start)
    module = attention(cfg)
    assert_agrees(module, lambda x: module(x, info).update, oracle_of(cfg, info), random(LENGTH, BATCH, HIDDEN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_query_groups": 2, "rotary_percent": 0.5},
        {"position_embedding_type": "none", "kv_channels": 10},
        {"qk_layernorm": True, "num_query_groups": 2, "rotary_interleaved": True, "use_rope_scaling": True},
    ],
)
def test_the_fused_form_is_the_other(monkeypatch: pytest.MonkeyPatch, changes: dict, dtype: torch.dtype) -> None:
    """With documents, and with the core computed again; nothing else is kept of queries and keys."""
    if not takes_fused(torch.empty(1, 1, 3, 1)):
        pytest.skip("the compiled attention is not built, or before this operator")
    start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    start[0, 2], start[1, 5] = True, True
    info, module = PackedSequence(BATCH, LENGTH, CPU, start), attention(config(**changes), dtype)
    x, direction = (random(LENGTH, BATCH, HIDDEN, seed=i).to(dtype) for i in (1, 2))
    found = []
    for fused, again in ((True, False), (True, True), (False, False)):
        module.recompute_core = again
        monkeypatch.setattr("megaforge.nn.attention.takes_fused", lambda x, fused=fused: fused)
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        out = module(leaves[0], info).update
        found.append([out.detach(), *torch.autograd.grad(out, leaves, direction)])
    close = 2e-6 if dtype == torch.float32 else 2e-2
    for one, again, other in zip(*found, strict=True):
        assert torch.equal(one, again)
        assert float((one - other).double().norm()) <= close * max(float(other.double().norm()), 0.1)


class _Largest(TorchDispatchMode):
    """The largest tensor that an operator gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_documents_on_a_gpu_need_no_tensor_of_length_by_length(dtype: torch.dtype) -> None:
    """Both ways at 32,768 tokens, in shapes alone, with flash attention and without."""
    length, cfg = 32768, config(num_query_groups=2)
    start = torch.zeros(1, length, dtype=torch.bool)
    start[0, 700::700] = True
    layer = SelfAttention(layer_context(cfg, dtype, count=3)).to("meta")
    x = torch.empty(length, 1, HIDDEN, dtype=dtype, device="meta", requires_grad=True)
    with _Largest() as largest:
        layer(x, PackedSequence(1, length, torch.device("meta"), start)).update.sum().backward()
    # Blocks of 64 queries, which see two documents at most.
    assert length * HIDDEN <= largest.numel <= 4 * length * HIDDEN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rank_of_cp_on_a_gpu_needs_no_tensor_of_length_by_length(dtype: torch.dtype) -> None:
    """The later half of 32,768 tokens, to all of them and to the earlier half alone."""
    length, half = 32768, 16384
    start = torch.zeros(1, length, dtype=torch.bool)
    start[0, 700::700] = True
    info = PackedSequence(1, length, torch.device("meta"), start)
    query, key = (torch.empty(1, n, s, 64, dtype=dtype, device="meta") for n, s in ((4, half), (2, length)))
    rows = range(half, length)
    with _Largest() as largest:
        query.requires_grad_()
        causal_attention(query, key, key, info.segments(rows, range(length))).sum().backward()
        earlier, seen = key[:, :, :half], info.segments(rows, range(half))
        out, lse = attention_with_lse(query, earlier, earlier, seen)
        attention_gradients(out, query, earlier, earlier, out, lse, seen)
    assert largest.numel <= 4 * length * 64


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4 * 8), (torch.float32, 64 * 4)])
def test_a_piece_of_a_prompt_on_a_gpu_needs_no_mask_of_all_keys(dtype: torch.dtype, most: int) -> None:
    """512 tokens after 32,256 that are cached: flash attention makes nothing larger than keys of all heads; without it
    there are the scores of 64 queries."""
    length, piece, cfg = 32768, 512, config(num_query_groups=2, kv_channels=8)
    layer = SelfAttention(layer_context(cfg, dtype, count=3)).to("meta")
    held = [torch.empty(1, 2, length, layer.head_dim, dtype=dtype, device="meta") for _ in range(2)]
    cache = KVCache(*held, length - piece, length)
    x = torch.empty(piece, 1, HIDDEN, dtype=dtype, device="meta")
    with _Largest() as largest:
        layer(x, PackedSequence(1, piece, torch.device("meta"), offset=length - piece), state=cache)
    assert cache.length == length and 2 * length <= largest.numel <= most * length


@pytest.mark.parametrize("packed", [False, True])
def test_segments_compiled_and_in_blocks(packed: bool) -> None:
    """In fp32, against blocks in fp64; then a cache of two sequences of different lengths, continued."""
    if "cpu" not in native.COMPILED:
        pytest.skip("not built")
    start = torch.zeros(BATCH, 20, dtype=torch.bool)
    start[0, [2, 3]] = start[1, 5] = packed
    infos = [PackedSequence(BATCH, 20, CPU, start) for _ in range(2)]
    wide, narrow = (attention(config(num_query_groups=2), dtype) for dtype in (torch.float64, torch.float32))
    narrow.load_state_dict(wide.state_dict())
    x = random(20, BATCH, HIDDEN)
    expected, found = wide(x, infos[0]).update, narrow(x.float(), infos[1]).update
    assert_close(found.double(), expected, 2e-6, "output")
    assert infos[0]._mask is None and infos[1]._mask is None
    caches = [KVCache(), KVCache()]
    before = PackedSequence(1, 12, CPU)
    for cache, module, kind in zip(caches, (wide, narrow), (torch.float64, torch.float32), strict=True):
        module(x[:12, :1].to(kind), before, state=cache)
    longer = [KVCache.side_by_side([cache, cache], 15) for cache in caches]
    rest = PackedSequence(BATCH, 8, CPU, offset=15, padding_B=torch.tensor([3, 3]))
    expected = wide(x[12:], rest, state=longer[0]).update
    found = narrow(x[12:].float(), rest, state=longer[1]).update
    assert_close(found.double(), expected, 2e-6, "output after a cache")


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1, 1), (4, 1, 1, 1), (3, 4)])
def test_cache_continues_the_parallel_form(cuts: tuple[int, ...]) -> None:
    changes = {"qk_layernorm": True, "rotary_interleaved": True, "use_rope_scaling": True, "add_qkv_bias": True}
    module = attention(config(num_query_groups=2, **changes))
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


def test_which_parameters_there_are() -> None:
    """Biases of q, k and v alone; norms decay where that is asked for, their biases never."""
    cfg = config(qk_layernorm=True, add_qkv_bias=True, normalization="layernorm", apply_wd_to_qk_layernorm=True)
    specs = {spec.name: spec for spec, _ in named_specs(attention(cfg))}
    assert "a.qkv.bias" in specs and "a.output.bias" not in specs
    norms = {name: spec.weight_decay for name, spec in specs.items() if "norm" in name}
    assert norms == {f"a.{n}_norm.{w}": w == "weight" for n in ("query", "key") for w in ("weight", "bias")}
    plain = [spec for spec, _ in named_specs(attention(config(qk_layernorm=True)))]
    assert not any(spec.weight_decay for spec in plain if "norm" in spec.name)


def test_as_transformers_qwen3() -> None:
    transformers = pytest.importorskip("transformers")
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    cfg = config(qk_layernorm=True, num_query_groups=2, kv_channels=8, rotary_base=1e4)
    theirs = qwen3.Qwen3Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=cfg.norm_epsilon,
        num_hidden_layers=1,
        vocab_size=8,
        intermediate_size=8,
        attn_implementation="eager",
    )
    assert transformers.__version__
    module, other = attention(cfg), qwen3.Qwen3Attention(theirs, 0).double()
    parts = module.qkv.weight.split((32, 16, 16))
    named = {f"{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    named |= {"q_norm.weight": module.query_norm.weight, "k_norm.weight": module.key_norm.weight}
    other.load_state_dict({**named, "o_proj.weight": module.output.weight})
    x, rope = random(LENGTH, BATCH, HIDDEN), qwen3.Qwen3RotaryEmbedding(theirs)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    turn = tuple(part.double() for part in rope(x, positions))  # its angles are fp32
    hidden = torch.full((LENGTH, LENGTH), -math.inf, dtype=torch.float64).triu(1).expand(BATCH, 1, -1, -1)
    expected = other(x.transpose(0, 1), turn, hidden)[0].transpose(0, 1)
    assert_close(module(x, PackedSequence(BATCH, LENGTH, CPU)).update, expected, 1e-6, "output")
