"""The next token's scores by one operator a block (:mod:`megaforge.kernels.decode`), for models of layers that it
knows: the same weights and states as the layers' own, and the same scores up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megaforge.inference.few_tokens import FewTokenLinear
from megaforge.kernels.decode import (
    ACTIVATIONS,
    FFN,
    GATED,
    MOST_TOKENS,
    TYPES,
    Angles,
    Attention,
    Block,
    Experts,
    Norm,
    Product,
    Router,
    TimeMix,
    is_compiled,
    step_block,
    step_experts,
    step_head,
    takes_codes,
)
from megaforge.kernels.moe_routing import RoutingRule, moe_route
from megaforge.kernels.native import say_fallback, say_uncompiled
from megaforge.models.generation_state import GenerationState
from megaforge.models.hybrid import HybridModel
from megaforge.nn.attention import KVCache, SelfAttention
from megaforge.nn.block import Block as ModelBlock
from megaforge.nn.head import OutputHead
from megaforge.nn.mlp import DenseFFN
from megaforge.nn.moe.experts import SharedExpert
from megaforge.nn.moe.layer import MoEFFN
from megaforge.nn.moe.router import Router as ModelRouter
from megaforge.nn.moe.routing import routing_rule
from megaforge.nn.norms import ExpertSubNorm, LayerNorm, RMSNorm, SubNorm
from megaforge.nn.rope import Rotary
from megaforge.nn.rwkv7 import GROUP_NORM_EPSILON, RWKV7State, RWKV7TimeMix
from megaforge.parallel.layers import ColumnParallelLinear, GroupedLinear, Linear, ReplicatedLinear, RowParallelLinear
from megaforge.parallel.linear_op import PLAIN
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.quant.packed import PackedLinear

M = TypeVar("M", bound=nn.Module)


class NotFused(Exception):
    """This model computes one layer after the other; the message says why."""


@dataclass(frozen=True)
class _Routed:
    """A router's rule, and its experts."""

    rule: RoutingRule
    bias: Tensor | None
    experts: Experts


@dataclass(frozen=True)
class _Layer:
    """A block of the model: what the operator takes, and what is around it."""

    block: Block
    rotation: Rotary | None = None
    routed: _Routed | None = None


class FusedStep:
    """Steps of a model. What they are made of is looked up again after each prompt, so that a model that was changed
    since (other weights, a hook) goes on with what it is."""

    def __init__(self, model: HybridModel) -> None:
        self.model = model
        self._layers: list[_Layer] | None = None
        self._head: tuple[Norm, Tensor] | None = None

    def takes(self, tokens: Tensor, state: GenerationState) -> bool:
        """Whether these tokens int64 [b, s] are a step that :meth:`logits` makes: one of each of a few sequences that
        ``state`` knows. The first time that such a step is not, it says why."""
        if tokens.shape[1] != 1 or state.length == 0:
            self._layers = None
            return False
        if not 1 <= tokens.shape[0] <= MOST_TOKENS or self.model.ctx.device.type != "cpu":
            return False
        if not is_compiled("cpu"):
            say_uncompiled("decode", "cpu")
            return False
        if self._layers is None:
            try:
                self._prepare()
            except NotFused as reason:
                say_fallback("decode", str(reason), "one operator after another")
                self._layers = []
        return bool(self._layers)

    def _prepare(self) -> None:
        _check_model(self.model)
        self._layers = [_layer_of(block) for block in self.model.blocks]
        head = _known(self.model.head, OutputHead)
        self._head = _norm_of(self.model.final_norm), _product(head, OutputHead)[0][: head.vocab_size]

    @torch.no_grad()
    def logits(self, tokens: Tensor, state: GenerationState) -> Tensor:
        """Scores after the tokens: int64 [b, 1] -> [b, vocabulary] in the model's type. ``state`` takes them in.

        Raises:
            ValueError: several tokens of a sequence, of which the first alone would be taken.
        """
        model = self.model
        if tokens.dim() != 2 or tokens.shape[1] != 1:
            raise ValueError(f"one token of each sequence is taken, [b, 1]; here are {list(tokens.shape)}")
        assert self._layers and self._head is not None
        info = model.pack(tokens, None, state)
        x = model.embedded(tokens, info)[0].to(torch.float32).contiguous()
        v_first = x.new_empty(len(x), next(_widths(self._layers), 0))
        states = iter(state.layers)
        for layer, block in zip(self._layers, model.blocks, strict=True):
            own = _ready(next(states), model.dtype)
            ffn_state = _ready(next(states), model.dtype) if block.kind.ffn is not None else None
            self._step(layer, x, own, ffn_state, v_first, info)
        state.length += 1
        return step_head(x, *self._head)

    def _step(self, layer: _Layer, x: Tensor, own: Any, ffn_state: Any, v_first: Tensor, info: PackedSequence) -> None:
        angles = None if layer.rotation is None else Angles(*layer.rotation.tables(info, torch.float32))
        routed = None
        if layer.routed is not None:
            inside = torch.empty(x.shape, dtype=self.model.dtype)
            routed = inside, x.new_empty(len(x), len(layer.routed.experts.up))
        step_block(x, layer.block, own, ffn_state, v_first, angles=angles, unused=info.padding_B, routed=routed)
        if layer.routed is not None and routed is not None:
            route = moe_route(routed[1], layer.routed.rule, layer.routed.bias, len(x))
            step_experts(x, layer.routed.experts, routed[0], route.experts, route.weights)


def _widths(layers: list[_Layer]) -> Iterator[int]:
    for layer in layers:
        if isinstance(layer.block.mixer, TimeMix):
            yield layer.block.mixer.heads * layer.block.mixer.head_size


def _ready(state: Any, dtype: torch.dtype) -> Any:
    """A layer's state as the operator takes it: of whole tensors of their types, with room for a token."""
    if isinstance(state, KVCache):
        assert state.keys is not None
        state.make_room(state.length + 1, state.keys)
    elif state is not None:
        state.shift = state.shift.to(dtype).contiguous()
    if isinstance(state, RWKV7State):
        assert state.wkv is not None
        state.wkv = state.wkv.contiguous()
    return state


def _check_model(model: HybridModel) -> None:
    if model.ctx.world.size > 1:
        raise NotFused("the model is split over ranks")
    if model.dtype not in TYPES:
        raise NotFused(f"the model is in {model.dtype}".replace("torch.", ""))
    if model.training:
        raise NotFused("the model is in training")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise NotFused(f"{name or 'the model'} has a hook")


def _known(module: nn.Module, kind: type[M]) -> M:
    """``module``, which must be of just this class."""
    if type(module) is not kind:
        raise NotFused(f"no step is made of {type(module).__name__}")
    return module


def _vector(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise NotFused(f"a vector of the model is in {tensor.dtype}".replace("torch.", ""))
    return tensor.detach()


def _norm_of(module: nn.Module) -> Norm:
    """Of a norm, or of what stands where there is none."""
    if isinstance(module, nn.Identity):
        return Norm()
    if type(module) is LayerNorm:
        return Norm(_vector(module.weight), _vector(module.bias), module.epsilon)
    if isinstance(module, (RMSNorm, SubNorm)) and type(module) in (RMSNorm, SubNorm):
        return Norm(_vector(module.weight), None, module.epsilon)
    raise NotFused(f"no step is made of {type(module).__name__}")


def _product(module: nn.Module, kind: type[Linear]) -> tuple[Tensor, Tensor | None]:
    layer = _known(module, kind)
    if layer.op is not PLAIN and type(layer.op) is not FewTokenLinear:
        raise NotFused(f"products are those of {type(layer.op).__name__}")
    bias = None if layer.bias is None else layer.bias.detach()
    return layer.matrix.detach(), bias


def _product_or_codes(module: nn.Module, kind: type[Linear], *, gated: bool = False) -> Product:
    layer = _known(module, kind)
    if not isinstance(layer.op, PackedLinear):
        return _product(layer, kind)
    codes = layer.op.whole_product
    if codes is None or layer.bias is not None or not takes_codes(codes, gated=gated):
        raise NotFused("packed codes are not all of a product, or are of rows that are not whole panels")
    return codes


def _time_mix(module: nn.Module, norm: Norm) -> TimeMix:
    layer = _known(module, RWKV7TimeMix)

    def column(of: nn.Module) -> Product:
        return _product(of, ColumnParallelLinear)

    letters = "wag" if layer.makes_v_first else "wagv"
    maps = [
        (_product(getattr(layer, f"{letter}1"), ReplicatedLinear), column(getattr(layer, f"{letter}2")))
        for letter in letters
    ]
    vectors = [layer.w0, layer.a0, layer.k_k, layer.k_a, layer.r_k, *([] if layer.makes_v_first else [layer.v0])]
    return TimeMix(
        norm=norm,
        mixes=tuple(_vector(getattr(layer, f"x_{letter}")) for letter in "rwkvag"),
        receptance=_product_or_codes(layer.receptance, ColumnParallelLinear),
        key=_product_or_codes(layer.key, ColumnParallelLinear),
        value=_product_or_codes(layer.value, ColumnParallelLinear),
        output=_product_or_codes(layer.output, RowParallelLinear),
        maps=tuple(maps),
        vectors=tuple(_vector(vector) for vector in vectors),
        head_norm=Norm(_vector(layer.ln_x["weight"]), _vector(layer.ln_x["bias"]), GROUP_NORM_EPSILON),
        heads=layer.local_heads,
        head_size=layer.head_size,
    )


def _attention(module: nn.Module, norm: Norm) -> Attention:
    layer = _known(module, SelfAttention)
    if layer.prefix is not None:
        raise NotFused("attention has a prefix")
    query_norm, key_norm = (Norm() if each is None else _norm_of(each) for each in (layer.query_norm, layer.key_norm))
    return Attention(
        norm=norm,
        qkv=_product_or_codes(layer.qkv, ColumnParallelLinear),
        output=_product_or_codes(layer.output, RowParallelLinear),
        query_norm=query_norm,
        key_norm=key_norm,
        sub_norm=_norm_of(layer.sub_norm),
        heads=layer.heads,
        groups=layer.groups,
        width=layer.head_dim,
        interleaved=layer.rotation is not None and layer.rotation.interleaved,
    )


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise NotFused(f"no step has the activation {name}")
    return name


def _dense(module: nn.Module, norm: Norm) -> FFN:
    layer = _known(module, DenseFFN)
    return FFN(
        norm=norm,
        mix=None if layer.x_k is None else _vector(layer.x_k),
        up=_product_or_codes(layer.up, ColumnParallelLinear, gated=layer.activation in GATED),
        down=_product_or_codes(layer.down, RowParallelLinear),
        sub_norm=_norm_of(layer.sub_norm),
        activation=_activation(layer.activation),
    )


def _router(module: nn.Module, norm: Norm) -> Router:
    layer = _known(module, MoEFFN)
    weight, bias = _product(layer.router, ModelRouter)
    return Router(norm, None if layer.x_k is None else _vector(layer.x_k), (_vector(weight), bias))


def _routed(layer: MoEFFN) -> _Routed:
    shared = None
    if layer.shared_expert is not None:
        own = _known(layer.shared_expert, SharedExpert)
        products = _product(own.up, ColumnParallelLinear), _product(own.down, RowParallelLinear)
        shared = *products, _norm_of(own.sub_norm)
    sub_norm = None if layer.sub_norm is None else _known(layer.sub_norm, ExpertSubNorm)
    experts = Experts(
        up=_product(layer.up, GroupedLinear)[0],
        down=_product(layer.down, GroupedLinear)[0],
        sub_norm=None if sub_norm is None else _vector(sub_norm.weight),
        epsilon=layer.router.cfg.norm_epsilon,
        activation=_activation(layer.activation),
        shared=shared,
    )
    bias = layer.router.expert_bias
    return _Routed(routing_rule(layer.router.cfg), None if bias is None else bias.detach(), experts)


# Of a model's layers those that the operator knows, by their classes.
MIXERS: Mapping[type[nn.Module], Callable[[nn.Module, Norm], TimeMix | Attention]] = {
    RWKV7TimeMix: _time_mix,
    SelfAttention: _attention,
}
FFNS: Mapping[type[nn.Module], Callable[[nn.Module, Norm], FFN | Router]] = {DenseFFN: _dense, MoEFFN: _router}


def _layer_of(module: nn.Module) -> _Layer:
    block = _known(module, ModelBlock)
    mixer = block.mixer
    if type(mixer) not in MIXERS:
        raise NotFused(f"no step is made of {type(mixer).__name__}")
    made, ffn, routed = MIXERS[type(mixer)](mixer, _norm_of(block.mixer_norm)), None, None
    if block.kind.ffn is not None:
        if type(block.ffn) not in FFNS:
            raise NotFused(f"no step is made of {type(block.ffn).__name__}")
        ffn = FFNS[type(block.ffn)](block.ffn, _norm_of(block.ffn_norm))
        routed = _routed(block.ffn) if isinstance(block.ffn, MoEFFN) else None
    rotation = mixer.rotation if isinstance(mixer, SelfAttention) else None
    return _Layer(Block(made, ffn), rotation, routed)
