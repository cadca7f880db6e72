"""The time-mix of RWKV-7 "Goose" (Peng et al., arXiv 2503.14456), as in BlinkDL/RWKV-LM's x070, heads split over tp."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.kernels.rwkv7_fused import mix_values, norm_bonus_gate, rwkv7_inputs
from megaforge.kernels.wkv7.backend import wkv7_backend
from megaforge.nn.recompute import recomputed
from megaforge.nn.relations import Projection
from megaforge.nn.spans import in_spans
from megaforge.nn.sublayer import NOTHING, LayerOutput, LayerState
from megaforge.nn.token_shift import shift_and_mix
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.context_parallel.wkv7 import context_parallel_wkv7
from megaforge.parallel.init_rules import Constant, Elementwise, InitRule, Normal, OfModule, Orthogonal, Uniform
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from megaforge.parallel.packed_sequence import PackedSequence

GROUP_NORM_EPSILON = 64e-5  # the published value, at any head size


@dataclass
class RWKV7State(LayerState):
    """What a time-mix remembers of the tokens it has seen; nothing before the first.

    Attributes:
        shift: [b, h], the last (normed) input.
        wkv: [b, H/tp, N (value), N (key)] in fp32 (fp64 for fp64 models), this rank's heads.
    """

    shift: Tensor | None = None
    wkv: Tensor | None = None


@dataclass(frozen=True)
class LoraRanks:
    """Inner sizes of the low-rank maps that make decay, in-context learning rate, value mix and gate."""

    decay: int
    iclr: int
    value: int
    gate: int


def lora_ranks(cfg: ModelConfig) -> LoraRanks:
    """The ranks that ``cfg`` names; unnamed ones by the published rule of the width (published models also differ
    from it, so an imported model names all of them)."""

    def rule(factor: float) -> int:
        return max(32, round(factor * math.sqrt(cfg.hidden_size) / 32) * 32)

    return LoraRanks(
        decay=cfg.rwkv_decay_rank or rule(2.5),
        iclr=cfg.rwkv_iclr_rank or rule(2.5),
        value=cfg.rwkv_value_rank or rule(1.7),
        gate=cfg.rwkv_gate_rank or rule(5.0),
    )


@dataclass(frozen=True)
class PublishedInit:
    """RWKV-LM's initial values for one layer, as functions of the channel index i."""

    hidden_size: int
    head_size: int
    layer_index: int
    num_layers: int

    def mix(self, power: float) -> Elementwise:
        """Token-shift coefficient ``1 - (i / C)^(power * (1 - l / L))``: zero at channel 0, more for early layers."""
        exponent = power * (1 - self.layer_index / self.num_layers)
        return Elementwise(lambda i: 1 - (i / self.hidden_size) ** exponent)

    def vector(self, formula: Callable[[Tensor, Tensor], Tensor]) -> Elementwise:
        """``formula(linear, zigzag)``: linear runs over the channels from -0.5 to 0.5, zigzag over those of each head
        from -1 to 1 (signed square)."""
        half = max(self.head_size - 1, 1) / 2

        def fill(i: Tensor) -> Tensor:
            zigzag = (i % self.head_size - half) / half
            return formula(i / max(self.hidden_size - 1, 1) - 0.5, zigzag * zigzag.abs())

        return Elementwise(fill)

    @property
    def decay(self) -> Elementwise:
        """w0: fast decay in the last channels of every head, slower overall in the early channels."""
        depth = self.layer_index / max(self.num_layers - 1, 1)
        power = 1 + depth**0.3
        return self.vector(lambda linear, zigzag: -5.5 + 6 * (linear + 0.5) ** power + 2.5 * zigzag)


def random_matrix(cfg: ModelConfig, gain: float, shape: tuple[int, int]) -> InitRule:
    """RWKV-7's rule for a projection: orthogonal times ``gain``, or Gaussian with the same mean square."""
    gain *= cfg.init_std_scale
    if cfg.rwkv_init == "normal":
        return Normal(gain / math.sqrt(max(shape)))
    return Orthogonal(gain)


def published_ends(cfg: ModelConfig) -> tuple[InitRule, InitRule]:
    """RWKV-LM's embedding, U(+-1e-4), and its head: orthogonal of gain 0.5 sqrt(V/h), or normal of the same scale."""
    vocab, hidden = cfg.vocab_size or cfg.padded_vocab_size(), cfg.hidden_size
    gain = 0.5 * math.sqrt(max(1.0, vocab / hidden)) * cfg.init_std_scale
    embedding = Uniform(1e-4 * cfg.init_std_scale, cfg.vocab_size)
    if cfg.rwkv_init == "orthogonal":
        return embedding, Orthogonal(gain, cfg.vocab_size)
    return embedding, Normal(gain / math.sqrt(max(vocab, hidden)), cfg.vocab_size)


def _channels(layer: LayerContext, init: InitRule, lr_mult: float = 1.0) -> nn.Parameter:
    """A vector over the channels of all heads."""
    shape = (layer.cfg.hidden_size,)
    return layer.parameter(shape, init, shard_dim=0, weight_decay=False, lr_mult=lr_mult, keep_fp32=True, kind="rwkv")


class RWKV7TimeMix(nn.Module):
    """RWKV-7's sequence mixer.

    Between ``region.enter`` and ``region.exit`` every rank sees every token and computes its own heads: projections,
    second LoRA factors and per-channel vectors are split over tp, and nothing else communicates over it. The
    token-shift coefficients and first LoRA factors are replicated, and each rank has a part of their gradient. The
    ranks of cp, which share each sequence, give each other the last token of every chunk and summaries of the states.
    """

    # Token-shift coefficients [C]; low-rank maps, stored as [C, rank] and [rank, C/tp]; per-channel vectors [C/tp].
    x_r: nn.Parameter
    x_w: nn.Parameter
    x_k: nn.Parameter
    x_v: nn.Parameter
    x_a: nn.Parameter
    x_g: nn.Parameter
    w1: ReplicatedLinear
    w2: ColumnParallelLinear
    a1: ReplicatedLinear
    a2: ColumnParallelLinear
    g1: ReplicatedLinear
    g2: ColumnParallelLinear
    v1: ReplicatedLinear
    v2: ColumnParallelLinear
    w0: nn.Parameter
    a0: nn.Parameter
    v0: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter
    r_k: nn.Parameter  # [H/tp, N]

    def __init__(self, layer: LayerContext) -> None:
        """Declares the parameters, uninitialised. The values of the model's first block (v_first) are mixed in by all
        others.

        Raises:
            UserError: ``--wkv-backend`` cannot run on the layout's device.
        """
        super().__init__()
        cfg, ctx = layer.cfg, layer.ctx
        size, head = cfg.hidden_size, cfg.rwkv_head_size
        self.region, self.index = layer.region, layer.index
        self.head_size, self.local_heads = head, size // head // ctx.tp.size
        self.makes_v_first = layer.first
        self.recompute_core, self.span = layer.recompute == "selective", layer.span
        self.wkv7 = wkv7_backend(layer.backends.get("wkv", "auto"), ctx.device, layer.dtype, head)
        self._declare_mixing(layer)
        self.receptance = self._column(layer, 1.0)
        self.key = self._column(layer, 0.1)
        self.value = self._column(layer, 1.0)
        self.output = RowParallelLinear(layer, size, size, init=Constant(0.0), kind="rwkv")

    def _declare_mixing(self, layer: LayerContext) -> None:
        """All but the projections: mixes of tokens, LoRAs, vectors over channels, the norm of the heads."""
        size, head = layer.cfg.hidden_size, self.head_size
        init = PublishedInit(size, head, layer.index, layer.count)
        for letter, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
            self._declare(layer, f"x_{letter}", (size,), init.mix(power), tp_partial_grad=True, keep_fp32=True)
        ranks = lora_ranks(layer.cfg)
        self._declare_lora(layer, "w", ranks.decay)
        self._declare_lora(layer, "a", ranks.iclr)
        self._declare_lora(layer, "g", ranks.gate)
        self._declare_channels(layer, "w0", init.decay, lr_mult=2.0)
        self._declare_channels(layer, "a0", init.vector(lambda linear, zigzag: -0.19 + 0.3 * zigzag + 0.4 * linear))
        if not self.makes_v_first:
            self._declare_lora(layer, "v", ranks.value)
            self._declare_channels(layer, "v0", init.vector(lambda linear, zigzag: 0.73 - 0.4 * linear))
        self._declare_channels(layer, "k_k", init.vector(lambda linear, zigzag: 0.71 - 0.1 * linear))
        self._declare_channels(layer, "k_a", Constant(1.02))
        self._declare(layer, "r_k", (size // head, head), Constant(-0.04), shard_dim=0, keep_fp32=True)
        weight, bias = Constant(((1 + layer.index) / layer.count) ** 0.7), Constant(0.0)
        self.ln_x = nn.ParameterDict([("weight", _channels(layer, weight)), ("bias", _channels(layer, bias))])

    def _declare(self, layer: LayerContext, name: str, shape: tuple[int, ...], init: InitRule, **declared: Any) -> None:
        """Registers ``self.<name>``, a parameter without weight decay."""
        self.register_parameter(name, layer.parameter(shape, init, weight_decay=False, kind="rwkv", **declared))

    def _declare_channels(self, layer: LayerContext, name: str, init: InitRule, lr_mult: float = 1.0) -> None:
        self.register_parameter(name, _channels(layer, init, lr_mult))

    def _declare_lora(self, layer: LayerContext, letter: str, rank: int) -> None:
        size = layer.cfg.hidden_size
        declared: dict[str, Any] = {"weight_decay": False, "kind": "rwkv", "update": "elementwise"}
        first = layer.parameter((size, rank), Constant(0.0), role="matrix", tp_partial_grad=True, **declared)
        init = OfModule(random_matrix(layer.cfg, 0.1, (rank, size)))
        second = ColumnParallelLinear(layer, rank, size, init=init, transposed=True, **declared)
        self.add_module(f"{letter}1", ReplicatedLinear(first, transposed=True))
        self.add_module(f"{letter}2", second)

    def _column(self, layer: LayerContext, gain: float) -> ColumnParallelLinear:
        size = layer.cfg.hidden_size
        init = random_matrix(layer.cfg, gain, (size, size))
        return ColumnParallelLinear(layer, size, size, init=init, kind="rwkv")

    def relation_projections(self) -> tuple[Projection, ...]:
        """See :class:`megaforge.nn.relations.HasRelations`; receptance is the query."""
        heads = ((self.local_heads, self.head_size),)
        return tuple(Projection(module, heads) for module in (self.receptance, self.key, self.value))

    def new_state(self) -> RWKV7State:
        return RWKV7State()

    def forward(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        state: RWKV7State | None = None,
    ) -> LayerOutput:
        """Mixes the tokens of each document.

        Args:
            x: [s(/tp), b, h], normed, on the residual stream.
            info: the micro-batch's document boundaries.
            carried: ``v_first`` [s, b, C/tp], values of the first RWKV-7 layer; that layer makes it.
            state: continues the sequence from it and is updated in place.

        Raises:
            ValueError: ``v_first`` is missing in a layer that mixes it in.
        """
        x = self.region.enter(x)
        coefficients = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        mixes = shift_and_mix(x, info, None if state is None else state.shift, coefficients)
        r, decay, key, v, rate, gate = self._project(mixes, carried.get("v_first"))
        made = {"v_first": v} if self.makes_v_first else NOTHING
        heads = (*x.shape[:2], self.local_heads, self.head_size)
        r, v = r.view(heads), v.view(heads)
        starts = info.document_start_SB if info.has_boundaries else None
        inputs = (r, v, decay, key, rate, starts)
        if state is not None:
            y, k, final = self._recurrence(*inputs, state.wkv)
            state.shift, state.wkv = x[-1].clone(), final  # a view would keep the whole prompt's
        elif info.shards.axis.size > 1:
            y, k = recomputed(self.recompute_core, self._shared_recurrence, *inputs, info.shards)
        elif self.span is not None:
            y, k = in_spans(self._span, self.span, inputs, (None,))
        else:
            y, k, _ = recomputed(self.recompute_core, self._recurrence, *inputs)
        norm = (self.ln_x["weight"], self.ln_x["bias"])
        out = self.output(norm_bonus_gate(y, r, k, v, gate, *norm, self.r_k, GROUP_NORM_EPSILON))
        return LayerOutput(out, made)

    def _recurrence(
        self,
        r: Tensor,
        v: Tensor,
        decay: Tensor,
        key: Tensor,
        rate: Tensor,
        starts: Tensor | None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """WKV and the arithmetic in front of it: y and k [s, b, H/tp, N], and the final state."""
        log_w, k, a, b = rwkv7_inputs(decay, self.w0, rate, self.a0, key, self.k_k, self.k_a, self.head_size)
        y, final = self.wkv7(r, log_w, k, v, a, b, memory, starts)
        return y, k, final

    def _span(self, tokens: tuple[Any, ...], state: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        y, k, final = self._recurrence(*tokens, *state)
        return (y, k), (final,)

    def _shared_recurrence(
        self,
        r: Tensor,
        v: Tensor,
        decay: Tensor,
        key: Tensor,
        rate: Tensor,
        starts: Tensor | None,
        shards: ContextParallelShard,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`_recurrence` of whole sequences that the ranks of cp share."""
        log_w, k, a, b = rwkv7_inputs(decay, self.w0, rate, self.a0, key, self.k_k, self.k_a, self.head_size)
        return context_parallel_wkv7(r, log_w, k, v, a, b, starts, shards, self.wkv7), k

    def _project(self, mixes: tuple[Tensor, ...], v_first: Tensor | None) -> tuple[Tensor, ...]:
        """r, decay before its bias, key, v, in-context learning rate before its bias, gate: each [s, b, C/tp]."""
        x_r, x_w, x_k, x_v, x_a, x_g = mixes
        r, key, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        if not self.makes_v_first:
            if v_first is None:
                raise ValueError(
                    f"block {self.index}: v_first is missing; the model's first mixer must be an RWKV-7 layer"
                )
            v = mix_values(v, v_first, self.v2(self.v1(x_v)), self.v0)
        decay = self.w2(torch.tanh(self.w1(x_w)))
        gate = self.g2(torch.sigmoid(self.g1(x_g)))
        return r, decay, key, v, self.a2(self.a1(x_a)), gate
