"""The logical tensors of an attention model, one by one, by the parts that they play."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of
from megaforge.parallel.param_spec import Box, ParamSpec


class Piece(NamedTuple):
    """One logical tensor.

    Attributes:
        role: ``embedding``, ``head``, ``norm``, ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``,
            ``attention_norm``, ``ffn_norm``, ``attention_sub_norm``, ``ffn_sub_norm``, ``q_norm``, ``k_norm``,
            ``router``, ``expert_gate``, ``expert_up`` or ``expert_down``.
        layer: its block; None of the model's ends.
        name: the parameter that it is a part of.
        rows: (first, end) of its rows there; None: all.
        part: its number among the parameter's logical matrices.
        expert: its place in a stack of experts' matrices.
    """

    role: str
    layer: int | None
    name: str
    rows: tuple[int, int] | None = None
    part: int = 0
    expert: int | None = None

    @property
    def is_bias(self) -> bool:
        return self.name.endswith(".bias")

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of the parameter, or of something with as many rows."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def box(self, shape: tuple[int, ...]) -> Box:
        """Where it lies in its parameter, which has this ``shape``."""
        whole = tuple((0, size) for size in shape)
        if self.expert is not None:
            return ((self.expert, self.expert + 1), self.rows or whole[1], *whole[2:])
        return whole if self.rows is None else (self.rows, *whole[1:])


def pieces(cfg: ModelConfig, specs: Mapping[str, ParamSpec]) -> Iterator[Piece]:
    """Every logical tensor of a model of attention blocks with FFNs, whose parameters are ``specs``; the head only
    where it has a matrix of its own."""
    vocabulary = (0, cfg.vocab_size or cfg.padded_vocab_size())
    yield Piece("embedding", None, "embedding.weight", vocabulary)
    for i, block in enumerate(blocks_of(cfg)):
        at = f"layers.{i}"
        yield Piece("attention_norm", i, f"{at}.mixer_norm.weight")
        yield Piece("ffn_norm", i, f"{at}.ffn_norm.weight")
        yield from _attention(cfg, specs, i)
        yield from (_experts if block.ffn is not None and block.ffn.has_experts else _dense)(cfg, specs, i)
    yield Piece("norm", None, "final_norm.weight")
    if cfg.untie_embeddings_and_output_weights:
        yield Piece("head", None, "head.weight", vocabulary)


def _attention(cfg: ModelConfig, specs: Mapping[str, ParamSpec], layer: int) -> Iterator[Piece]:
    at = f"layers.{layer}.mixer"
    if cfg.sub_norm:
        yield Piece("attention_sub_norm", layer, f"{at}.sub_norm.weight")
    if cfg.qk_layernorm:
        yield Piece("q_norm", layer, f"{at}.query_norm.weight")
        yield Piece("k_norm", layer, f"{at}.key_norm.weight")
    for kind in ("weight", "bias"):
        if f"{at}.qkv.{kind}" in specs:
            yield from _parts(specs, ("q", "k", "v"), layer, f"{at}.qkv.{kind}")
        if f"{at}.output.{kind}" in specs:
            yield Piece("o", layer, f"{at}.output.{kind}")


def _dense(cfg: ModelConfig, specs: Mapping[str, ParamSpec], layer: int) -> Iterator[Piece]:
    at = f"layers.{layer}.ffn"
    if cfg.sub_norm:
        yield Piece("ffn_sub_norm", layer, f"{at}.sub_norm.weight")
    for kind in ("weight", "bias") if cfg.add_bias_linear else ("weight",):
        yield from _parts(specs, ("gate", "up") if cfg.is_gated else ("up",), layer, f"{at}.up.{kind}")
        yield Piece("down", layer, f"{at}.down.{kind}")


def _experts(cfg: ModelConfig, specs: Mapping[str, ParamSpec], layer: int) -> Iterator[Piece]:
    at = f"layers.{layer}.ffn"
    yield Piece("router", layer, f"{at}.router.weight")
    roles = ("expert_gate", "expert_up") if cfg.is_gated else ("expert_up",)
    for expert in range(cfg.num_experts):
        for piece in _parts(specs, roles, layer, f"{at}.up.weight"):
            yield piece._replace(expert=expert)
        yield Piece("expert_down", layer, f"{at}.down.weight", expert=expert)


def _parts(specs: Mapping[str, ParamSpec], roles: tuple[str, ...], layer: int, name: str) -> Iterator[Piece]:
    start = 0
    sizes = specs[name].parts or (specs[name].shape[0],)
    for number, (role, size) in enumerate(zip(roles, sizes, strict=True)):
        yield Piece(role, layer, name, (start, start + size), number)
        start += size
