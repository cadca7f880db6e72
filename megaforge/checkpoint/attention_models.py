"""A trained attention model in the words of those who publish such models: which of its architectures others know, and
what its matrices are called there one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from megaforge.checkpoint.packed_file import QuantizedModel
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of
from megaforge.errors import UserError
from megaforge.parallel.param_spec import ParamSpec
from megaforge.registry import LAYER_KINDS


class Piece(NamedTuple):
    """One logical tensor.

    Attributes:
        role: ``embedding``, ``head``, ``norm``, ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``,
            ``attention_norm``, ``ffn_norm``, ``attention_sub_norm`` or ``ffn_sub_norm``.
        layer: its block; None of the model's ends.
        name: the parameter that it is a part of.
        rows: (first, end) of its rows there; None: all.
        part: its number among the parameter's logical matrices.
    """

    role: str
    layer: int | None
    name: str
    rows: tuple[int, int] | None = None
    part: int = 0

    @property
    def is_bias(self) -> bool:
        return self.name.endswith(".bias")

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of the parameter, or of something with as many rows."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


def architecture(model: QuantizedModel, wanted: str) -> str:
    """``bitnet`` (with sub-norms), ``llama`` or ``arcee`` (squared ReLU without a gate).

    Args:
        wanted: what it is asked for, for messages: ``--to hf``.

    Raises:
        UserError: no published architecture computes what the model does; with what would have to be otherwise.
    """
    cfg = model.config.model

    def refuse(has: str, instead: str) -> UserError:
        return UserError(
            f"{wanted}: the model of {model.source.path} has {has}, which its architectures do not know; train with "
            f"{instead}, or use --to packed, which holds every model"
        )

    attention, dense = LAYER_KINDS.get("*"), LAYER_KINDS.get("-")
    for block in blocks_of(cfg):
        for kind, allowed in ((block.mixer, attention), (block.ffn, dense)):
            if kind is not allowed:
                has = "a block without an FFN" if kind is None else f"{kind.title} layers"
                raise refuse(has, "--layer-schedule attention --ffn dense")
    if cfg.normalization != "rmsnorm":
        raise refuse("layer norms", "--normalization rmsnorm")
    if cfg.position_embedding_type != "rope" or cfg.rotary_percent != 1:
        raise refuse("positions other than rotary ones of whole heads", "--position-embedding-type rope")
    for name in (
        *("qk_layernorm", "add_qkv_bias", "use_rope_scaling", "rotary_interleaved"),
        "rotary_seq_len_interpolation_factor",
    ):
        if getattr(cfg, name):
            raise refuse(f"--{name.replace('_', '-')}", "models without it")
    if cfg.hadamard:
        raise refuse(f"activations that are rotated (--hadamard {cfg.hadamard})", "--hadamard 0")
    if any(scheme.kind not in ("binary", "ternary") for scheme in model.schemes.values()):
        raise refuse(f"{cfg.quantize_weights} weights", "--quantize-weights ternary or binary")
    if cfg.sub_norm:
        if not cfg.is_gated:
            gated = "--activation gated_relu2 or swiglu, or without --sub-norm"
            raise refuse(f"sub-norms and --activation {cfg.activation}", gated)
        if cfg.add_bias_linear:
            raise refuse("sub-norms and biases", "--no-add-bias-linear")
        if cfg.num_attention_heads * cfg.head_dim != cfg.hidden_size:
            raise refuse("heads that are not as wide as the model, and sub-norms", "no --kv-channels")
        return "bitnet"
    if cfg.activation in ("gelu", "gated_relu2"):
        with_norms = ", or with --sub-norm" if cfg.is_gated else ""
        raise refuse(f"--activation {cfg.activation}", f"--activation swiglu or relu2{with_norms}")
    return "llama" if cfg.activation == "swiglu" else "arcee"


def pieces(cfg: ModelConfig, specs: Mapping[str, ParamSpec]) -> Iterator[Piece]:
    """Every logical tensor of the model, whose parameters are ``specs``; the head only where it has a matrix of its
    own."""
    vocabulary = (0, cfg.vocab_size or cfg.padded_vocab_size())
    yield Piece("embedding", None, "embedding.weight", vocabulary)
    for i in range(len(blocks_of(cfg))):
        at = f"layers.{i}"
        yield Piece("attention_norm", i, f"{at}.mixer_norm.weight")
        yield Piece("ffn_norm", i, f"{at}.ffn_norm.weight")
        if cfg.sub_norm:
            yield Piece("attention_sub_norm", i, f"{at}.mixer.sub_norm.weight")
            yield Piece("ffn_sub_norm", i, f"{at}.ffn.sub_norm.weight")
        for kind in ("weight", "bias") if cfg.add_bias_linear else ("weight",):
            yield from _parts(specs, ("q", "k", "v"), i, f"{at}.mixer.qkv.{kind}")
            yield Piece("o", i, f"{at}.mixer.output.{kind}")
            roles = ("gate", "up") if cfg.is_gated else ("up",)
            yield from _parts(specs, roles, i, f"{at}.ffn.up.{kind}")
            yield Piece("down", i, f"{at}.ffn.down.{kind}")
    yield Piece("norm", None, "final_norm.weight")
    if cfg.untie_embeddings_and_output_weights:
        yield Piece("head", None, "head.weight", vocabulary)


def _parts(specs: Mapping[str, ParamSpec], roles: tuple[str, ...], layer: int, name: str) -> Iterator[Piece]:
    start = 0
    sizes = specs[name].parts or (specs[name].shape[0],)
    for number, (role, size) in enumerate(zip(roles, sizes, strict=True)):
        yield Piece(role, layer, name, (start, start + size), number)
        start += size
