"""Causal self-attention (Vaswani et al., arXiv 1706.03762) with grouped queries (Ainslie et al., arXiv 2305.13245)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from megaforge.kernels.attention import causal_attention, step_attention
from megaforge.kernels.attention.fused import fused_attention, takes_fused
from megaforge.nn.norms import make_head_norm, make_sub_norm
from megaforge.nn.recompute import recomputed
from megaforge.nn.relations import Projection
from megaforge.nn.rope import Rotary
from megaforge.nn.sublayer import NOTHING, LayerOutput, LayerState
from megaforge.parallel.context_parallel.attention import context_parallel_attention, largest_visible_logits
from megaforge.parallel.context_parallel.dropped_attention import dropped_attention_of
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.registry import POSITION_EMBEDDINGS


@dataclass
class KVCache(LayerState):
    """Keys and values of the tokens seen so far, this rank's heads: [b, groups/tp, capacity, d], ``length`` in use.
    ``room`` is how many are expected."""

    can_shorten: ClassVar[bool] = True
    keys: Tensor | None = None
    values: Tensor | None = None
    length: int = 0
    room: int = 0

    def expect(self, tokens: int) -> None:
        self.room = tokens

    @property
    def expected(self) -> int:
        return self.room

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [b, groups/tp, s, d] and returns all keys and values so far."""
        new_length = self.length + keys.shape[2]
        self.make_room(new_length, keys)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.length : new_length] = keys
        self.values[:, :, self.length : new_length] = values
        self.length = new_length
        return self.keys[:, :, :new_length], self.values[:, :, :new_length]

    def make_room(self, length: int, like: Tensor) -> None:
        """For ``length`` places, of keys and values like these. Capacity is what is expected, and doubles when it is
        exhausted."""
        if self.keys is not None and self.values is not None and length <= self.keys.shape[2]:
            return
        capacity = self.room if length <= self.room else max(64, 2 * length)
        shape = (*like.shape[:2], capacity, like.shape[3])
        grown = [like.new_empty(shape) for _ in range(2)]
        if self.keys is not None and self.values is not None:
            for target, source in zip(grown, (self.keys, self.values), strict=True):
                target[:, :, : self.length] = source[:, :, : self.length]
        self.keys, self.values = grown

    @classmethod
    def side_by_side(cls, states: Sequence[KVCache], length: int) -> KVCache:
        """One after the other along b, their last used place at ``length``."""
        room = max(state.room for state in states)
        capacity = room if length <= room else 2 * length
        keys = _aligned([(state.keys, state.length) for state in states], length, capacity)
        values = _aligned([(state.values, state.length) for state in states], length, capacity)
        return KVCache(keys, values, length, room)

    def slots(self, rows: int, places: int) -> KVCache:
        return self._each(lambda tensor: tensor.new_zeros((rows, tensor.shape[1], places, tensor.shape[3])))

    def recorded(self, place: Tensor) -> KVCache:
        return RecordedKVCache(self.keys, self.values, place=place)

    def fill(self, other: KVCache) -> None:
        self.length, self.room = other.length, other.room
        for own, given in ((self.keys, other.keys), (self.values, other.values)):
            assert own is not None and given is not None
            own[:, :, : self.length] = given[:, :, : self.length]

    def contents(self) -> Iterator[Tensor]:
        for tensor in (self.keys, self.values):
            if tensor is not None:
                yield tensor[:, :, : self.length]

    def stepped(self) -> None:
        self.length += 1

    def mark(self) -> Callable[[], None]:
        """Places behind those in use are anyone's: nothing is copied."""
        length = self.length
        return lambda: self.shorten(length)

    def shorten(self, tokens: int) -> None:
        self.length = tokens


@dataclass
class RecordedKVCache(KVCache):
    """One that takes tokens in at a ``place`` that the device alone knows, and always shows all of its places."""

    place: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None and self.place is not None
        return self.keys.index_copy_(2, self.place, keys), self.values.index_copy_(2, self.place, values)


def _aligned(caches: Sequence[tuple[Tensor | None, int]], length: int, capacity: int) -> Tensor:
    """Caches [b, groups, capacity, d] of so many places in use; zeros in front, for a place that a mask hides must
    still be a number."""
    filled = [(cache, used) for cache, used in caches if cache is not None]
    first, rows = filled[0][0], sum(cache.shape[0] for cache, _ in filled)
    out = first.new_zeros((rows, first.shape[1], capacity, first.shape[3]))
    start = 0
    for cache, used in filled:
        out[start : start + cache.shape[0], :, length - used : length] = cache[:, :, :used]
        start += cache.shape[0]
    return out


class HasPrefix(Protocol):
    """Keys and values in front of each document."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, info: PackedSequence, state: KVCache | None) -> Tensor:
        """Of queries [b, heads/tp, s, d] over those and the tokens' keys and values [b, groups/tp, s, d], which
        ``state`` takes in: [b, heads/tp, s, d]."""
        ...


class SelfAttention(nn.Module):
    """Multi-head or grouped-query attention, its heads split over tp; q, k and v come from one fused matrix.

    Attributes:
        prefix: what attends in the layer's place to a prefix too, or None; a converter may set it.
    """

    prefix: HasPrefix | None

    def __init__(self, layer: LayerContext) -> None:
        """The output projection starts smaller by 1/sqrt(2 layers) (GPT-2)."""
        super().__init__()
        cfg, ctx = layer.cfg, layer.ctx
        self.recompute_core = layer.recompute == "selective"
        self.head_dim = cfg.head_dim
        self.heads = cfg.num_attention_heads // ctx.tp.size
        self.groups = cfg.query_groups // ctx.tp.size
        self.index, self.own_heads = layer.index, range(ctx.tp.rank * self.heads, (ctx.tp.rank + 1) * self.heads)
        self.positions = cfg.position_embedding_type
        self.rotation = POSITION_EMBEDDINGS.get(cfg.position_embedding_type).rotation(cfg)
        queries, shared = cfg.num_attention_heads * cfg.head_dim, cfg.query_groups * cfg.head_dim
        std, bias = cfg.init_std * cfg.init_std_scale, cfg.add_bias_linear
        parts = (queries, shared, shared)
        declared: dict[str, Any] = {"bias": bias or cfg.add_qkv_bias, "parts": parts, "kind": "attention"}
        self.qkv = ColumnParallelLinear(layer, cfg.hidden_size, sum(parts), init=Normal(std), enter=True, **declared)
        self.query_norm, self.key_norm = (make_head_norm(layer) if cfg.qk_layernorm else None for _ in range(2))
        self.sub_norm = make_sub_norm(layer, queries)
        init = Normal(std / math.sqrt(2 * layer.count))
        self.output = RowParallelLinear(layer, queries, cfg.hidden_size, init=init, bias=bias, kind="attention")

        self.prefix = None
        self.watches_logits, self.largest_logits = False, cast(Tensor | None, None)

    def new_state(self) -> KVCache:
        return KVCache()

    def relation_projections(self) -> tuple[Projection, ...]:
        """See :class:`megaforge.nn.relations.HasRelations`."""
        width = self.head_dim
        return (Projection(self.qkv, ((self.heads, width), (self.groups, width), (self.groups, width))),)

    def _watch(self, query: Tensor, key: Tensor, info: PackedSequence) -> None:
        """Takes down the largest logits; a part that is computed again finds the same ones."""
        found, known = largest_visible_logits(query.detach(), key.detach(), info), self.largest_logits
        self.largest_logits = found if known is None else torch.maximum(known, found)

    def logit_factors(self, limit: float, alpha: float) -> dict[nn.Parameter, Tensor]:
        """See :class:`megaforge.training.qk_clip.HasLogits`."""
        if self.largest_logits is None:
            return {}
        largest = self.largest_logits.view(self.groups, -1).amax(1)
        share = torch.where((largest > limit) & largest.isfinite(), limit / largest, 1.0)
        each, width = self.heads // self.groups, self.head_dim
        query, key = share.pow(alpha).repeat_interleave(each * width), share.pow(1 - alpha).repeat_interleave(width)
        rows = torch.cat([query, key, torch.ones_like(key)])
        trained = (self.qkv.weight, self.qkv.bias)
        return {parameter: rows for parameter in trained if isinstance(parameter, nn.Parameter)}

    def _normed(self, query_key: Tensor) -> Tensor:
        """Queries and keys [s, b, (heads + groups)/tp, d], each head normed where ``--qk-layernorm`` says so."""
        if self.query_norm is None or self.key_norm is None:
            return query_key
        query, key = query_key.split((self.heads, self.groups), dim=2)
        return torch.cat([self.query_norm(query), self.key_norm(key)], dim=2)

    def forward(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        state: KVCache | None = None,
    ) -> LayerOutput:
        """Normed residual stream [s(/tp), b, h] -> residual stream [s(/tp), b, h].

        With a ``state`` the tokens continue the ones it holds, and it takes them in.
        """
        fused = self.qkv(x)
        length, batch = fused.shape[:2]
        if state is None and self._takes_fused(fused, info):
            context = self._attend_fused(fused, info)
        else:
            context = self._attend(fused, info, state).permute(2, 0, 1, 3)
        return LayerOutput(self.output(self.sub_norm(context.reshape(length, batch, -1))))

    def _takes_fused(self, fused: Tensor, info: PackedSequence) -> bool:
        """Whether attention reads what the projection gave as it is, and nobody else asks for queries and keys."""
        turned = self.rotation is None or isinstance(self.rotation, Rotary)
        drops = info.dropout is not None and info.dropout.rates.attention
        watched = self.watches_logits and self.training
        return (
            self.prefix is None
            and turned
            and not drops
            and not watched
            and info.shards.axis.size == 1
            and takes_fused(fused)
        )

    def _attend_fused(self, fused: Tensor, info: PackedSequence) -> Tensor:
        """[s, b, (heads + 2 groups)/tp * d] -> [s, b, heads/tp, d]."""
        length, batch = fused.shape[:2]
        parts, value = fused.view(length, batch, self.heads + 2 * self.groups, self.head_dim), None
        rotation = cast(Rotary | None, self.rotation)
        if self.query_norm is not None or (rotation is not None and rotation.interleaved):
            parts, value = parts.split((self.heads + self.groups, self.groups), dim=2)
            parts = self._normed(parts)
            parts = parts if rotation is None else rotation.in_halves(parts)
        turns = None if rotation is None else rotation.turns(info)
        segments = info.segments(range(length), range(length))
        out: Tensor = recomputed(self.recompute_core, fused_attention, parts, value, turns, segments, self.heads)
        return out

    def _attend(self, fused: Tensor, info: PackedSequence, state: KVCache | None) -> Tensor:
        """[s, b, (heads + 2 groups)/tp * d] -> [b, heads/tp, s, d]."""
        length, batch = fused.shape[:2]
        width = self.head_dim
        # split, not slices: its backward is one concatenation
        query_key, value = fused.split(((self.heads + self.groups) * width, self.groups * width), dim=-1)
        query_key = query_key.view(length, batch, self.heads + self.groups, width)
        query_key = self._normed(query_key)
        if self.rotation is not None:
            query_key = self.rotation(query_key, info)
        query, key = query_key.permute(1, 2, 0, 3).split((self.heads, self.groups), dim=1)
        value = value.view(length, batch, self.groups, width).permute(1, 2, 0, 3)
        if self.watches_logits and self.training and state is None:
            self._watch(query, key, info)
        if self.prefix is not None:
            return recomputed(self.recompute_core, self.prefix.attend, query, key, value, info, state)
        if info.dropout is not None and info.dropout.rates.attention:
            rows = info.dropout.attention_rows(self.index, self.own_heads)
            out: Tensor = recomputed(self.recompute_core, dropped_attention_of, query, key, value, rows, info)
        elif info.shards.axis.size > 1:
            out = recomputed(self.recompute_core, context_parallel_attention, query, key, value, info)
        else:
            if state is not None:
                key, value = state.append(key, value)
            if info.place is not None:
                return step_attention(query, key, value, info.places_mask(key.shape[2], query.dtype))
            seen = _seen(length, key.shape[2], info)
            out = recomputed(self.recompute_core, causal_attention, query, key, value, seen)
        return out


def _seen(length: int, keys: int, info: PackedSequence) -> Tensor | None:
    """Which of ``keys`` keys the last ``length`` tokens see, as segments; None: each all up to its own."""
    if info.padding_B is None and not info.has_boundaries and length in (1, keys):
        return None
    return info.segments(range(keys - length, keys), range(keys))
