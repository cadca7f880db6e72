"""``--peft prefix`` (Li and Liang, arXiv 2101.00190) and ``--peft p_tuning_v2`` (Liu et al., arXiv 2110.07602): keys
and values that no token has, in front of each document in every attention layer, are trained and nothing else.

P-tuning v2 trains them as they are; prefix tuning trains a small network for each layer that makes them. Queries keep
their positions in the document, and the keys are not turned by a rotary embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.kernels.attention import causal_attention, step_attention, taken_mask
from megaforge.nn.attention import KVCache, SelfAttention
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import InitRule, Normal
from megaforge.parallel.layers import is_whole
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import ParamSpec, make_parameter
from megaforge.peft.freeze import freeze_all


class Prefix(nn.Module):
    """What an attention layer has in front of each document; a child of it."""

    def __init__(self, attention: SelfAttention, cfg: ModelConfig, ctx: ParallelContext) -> None:
        super().__init__()
        self.length, self.ctx = cfg.prefix_length, ctx
        like = attention.qkv.weight
        self._dtype, self._place = like.dtype, like.device if like.is_meta else None
        self.shape = (cfg.query_groups, self.length, attention.head_dim)

    def declare(self, name: str, shape: tuple[int, ...], init: InitRule, **declared: Any) -> None:
        """Registers ``self.<name>``, a trained parameter of the type of the layer's."""
        spec = ParamSpec("", shape, init, weight_decay=False, kind="adapter", **declared)
        self.register_parameter(name, make_parameter(spec, self.ctx, self._dtype, self._place))

    @abstractmethod
    def keys_values(self) -> tuple[Tensor, Tensor]:
        """[groups/tp, length, d] each."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, info: PackedSequence, state: KVCache | None) -> Tensor:
        """Of queries [b, heads/tp, s, d] over the prefix and the tokens' keys [b, groups/tp, s, d], which ``state``
        takes in: [b, heads/tp, s, d]."""
        if state is not None:
            key, value = state.append(key, value)
        own = [one.to(key.dtype).expand(len(key), *one.shape) for one in self.keys_values()]
        key, value = (torch.cat(pair, 2) for pair in zip(own, (key, value), strict=True))
        if info.place is not None:
            return step_attention(query, key, value, self._mask(key.shape[2], query.dtype, info))
        order, segments = self._layout(query.shape[2], key.shape[2] - self.length, info)
        if order is not None:
            at = order.view(len(order), 1, -1, 1).expand(-1, key.shape[1], -1, key.shape[3])
            key, value = key.gather(2, at), value.gather(2, at)
        return causal_attention(query, key, value, segments)

    def _mask(self, places: int, dtype: torch.dtype, info: PackedSequence) -> Tensor:
        assert info.place is not None and info.padding_B is not None
        each = torch.arange(places, device=info.place.device)
        seen = (each - self.length <= info.place) & (each - self.length >= info.padding_B[:, None])
        return taken_mask((seen | (each < self.length))[:, None, None], dtype)

    def _layout(self, queries: int, keys: int, info: PackedSequence) -> tuple[Tensor | None, Tensor]:
        """Where each key is taken from when every document has the prefix in front of it (None: they lie so), and what
        sees what; made once a micro-batch."""
        name = ("prefix", self.length, queries, keys)
        if name not in info.cache:
            segments = info.segments(range(keys - queries, keys), range(keys))
            info.cache[name] = _laid_out(segments, info.batch, keys, self.length, info.document_start_SB.device)
        found: tuple[Tensor | None, Tensor] = info.cache[name]
        return found


def _laid_out(
    segments: Tensor, batch: int, keys: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    rows, taken = [], [list[Tensor]() for _ in range(batch)]
    for sequence, query, count, key, seen, ahead in segments.tolist():
        before = sum(len(part) for part in taken[sequence])
        taken[sequence] += [torch.arange(length), torch.arange(length + key, length + key + seen)]
        rows.append([sequence, query, count, before, length + seen, length + ahead])
    laid = torch.tensor(rows, dtype=torch.long).view(-1, 6)
    orders = [torch.cat(parts) if parts else torch.empty(0, dtype=torch.long) for parts in taken]
    if all(len(order) == length + keys and bool((order.diff() == 1).all()) for order in orders):
        return None, laid
    return nn.utils.rnn.pad_sequence(orders, batch_first=True).to(device), laid


class DirectPrefix(Prefix):
    """Keys and values are parameters. Keys begin as large as those of tokens: near zero each is the same to every
    query, and what a value learns goes to all. Values begin small, so that the model is nearly the base's."""

    keys: nn.Parameter
    values: nn.Parameter

    def __init__(self, attention: SelfAttention, cfg: ModelConfig, ctx: ParallelContext) -> None:
        super().__init__(attention, cfg, ctx)
        self.declare("keys", self.shape, Normal(1.0), shard_dim=0)
        self.declare("values", self.shape, Normal(cfg.init_std), shard_dim=0)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class MadePrefix(Prefix):
    """A layer of tanh between a table [length, width] and keys and values; the table and the first matrix are whole on
    every rank, which has the part of their gradient that its heads make."""

    table: nn.Parameter
    first: nn.Parameter
    second: nn.Parameter

    def __init__(self, attention: SelfAttention, cfg: ModelConfig, ctx: ParallelContext) -> None:
        super().__init__(attention, cfg, ctx)
        width = cfg.prefix_hidden_size
        groups, length, channels = self.shape
        whole: dict[str, Any] = {"tp_partial_grad": True, "update": "elementwise"}
        self.declare("table", (length, width), Normal(1.0), **whole)
        self.declare("first", (width, width), Normal(width**-0.5), role="matrix", **whole)
        shape = (2 * groups * channels, width)
        parts = (groups * channels,) * 2
        self.declare(
            "second", shape, Normal(cfg.init_std * width**-0.5), role="matrix", update="elementwise", shard_dim=0,
            parts=parts,
        )  # fmt: skip

    def keys_values(self) -> tuple[Tensor, Tensor]:
        inner = torch.tanh(self.table @ self.first.t())
        made = (inner @ self.second.t()).view(self.length, 2, -1, self.shape[2]).permute(1, 2, 0, 3)
        return made[0], made[1]


def prefix_tuning(model: nn.Module, ctx: ParallelContext) -> None:
    """The converter of ``--peft prefix``.

    Raises:
        UserError: a whole model has no attention layer.
    """
    _convert(model, ctx, MadePrefix)


def p_tuning_v2(model: nn.Module, ctx: ParallelContext) -> None:
    """That of ``--peft p_tuning_v2``, likewise."""
    _convert(model, ctx, DirectPrefix)


def _convert(model: nn.Module, ctx: ParallelContext, kind: type[Prefix]) -> None:
    cfg = cast(ModelConfig, model.cfg)
    freeze_all(model)
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    if not layers and is_whole(model):
        raise UserError(f"--peft {cfg.peft}: this model has no attention layer, which would see it; use --peft lora")
    for attention in layers:
        attention.prefix = kind(attention, cfg, ctx)
