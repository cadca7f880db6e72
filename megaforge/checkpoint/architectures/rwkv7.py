"""RWKV-7 "Goose" (Peng et al., arXiv 2503.14456): in RWKV-LM's words (x070's ``.pth``), and in those of its form for
Hugging Face (``rwkv7`` of fla-org/flash-linear-attention)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from megaforge.checkpoint.architectures.base import Architecture, Given, Objection, Part
from megaforge.config.model_config import ModelConfig
from megaforge.nn.rwkv7 import GROUP_NORM_EPSILON, lora_ranks
from megaforge.parallel.param_spec import ParamSpec

_EPSILON = 1e-5  # of the layer norms of every published model
_TOP = {"embedding": "emb", "embedding_norm": "blocks.0.ln0", "final_norm": "ln_out", "head": "head"}
_BLOCK = {
    "mixer_norm": "ln1",
    "ffn_norm": "ln2",
    "mixer": "att",
    "ffn.up": "ffn.key",
    "ffn.down": "ffn.value",
    "ffn": "ffn",
}
_LOW_RANK = frozenset(f"att.{letter}{half}" for letter in "wavg" for half in "12")  # tensors there, modules here
_RANKS = ("decay_low_rank_dim", "gate_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim")
_VECTORS = frozenset(
    (*(f"att.{name}" for name in ("w0", "a0", "v0", "k_k", "k_a")), *(f"att.x_{mix}" for mix in "rwkvag"), "ffn.x_k")
)
_HF_TOP = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
_HF_BLOCK = {
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.ln_x": "attn.g_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "att": "attn",
    "ffn": "ffn",
    **{f"att.{letter}0": f"attn.{letter}_lora.lora.2.bias" for letter in "wav"},
    **{f"att.{letter}1": f"attn.{letter}_lora.lora.0.weight" for letter in "wavg"},
    **{f"att.{letter}2": f"attn.{letter}_lora.lora.2.weight" for letter in "wavg"},
}


def pth_name(name: str) -> str:
    """RWKV-LM's name of a parameter of ours."""
    head, _, rest = name.partition(".")
    if head != "layers":
        return f"{_TOP[head]}.{rest}"
    index, _, rest = rest.partition(".")
    module = _longest(_BLOCK, rest)
    rest = _BLOCK[module] + rest[len(module) :]
    if rest.removesuffix(".weight") in _LOW_RANK:
        rest = rest.removesuffix(".weight")
    return f"blocks.{index}.{rest}"


def hf_name(name: str) -> str:
    """What a tensor of RWKV-LM's is called in the form for Hugging Face."""
    head, _, rest = name.partition(".")
    if head != "blocks":
        return f"{_HF_TOP[head]}.{rest}"
    index, _, rest = rest.partition(".")
    module = _longest(_HF_BLOCK, rest)
    return f"model.layers.{index}.{_HF_BLOCK[module]}{rest[len(module) :]}"


def _longest(table: Mapping[str, str], name: str) -> str:
    """The key of ``table`` that ``name`` is, or begins with as with a module."""
    return max((key for key in table if name == key or name.startswith(f"{key}.")), key=len)


def pth_parts(cfg: ModelConfig, specs: Mapping[str, ParamSpec]) -> Iterator[Part]:
    """Every tensor of RWKV-LM's that its model reads: vectors there are [1, 1, C], the vocabulary is not padded."""
    for name, spec in specs.items():
        theirs = pth_name(name)
        box = tuple((0, size) for size in spec.shape)
        if name in ("embedding.weight", "head.weight"):
            box = ((0, cfg.vocab_size or spec.shape[0]), *box[1:])
        shape = tuple(end for _, end in box)
        place = theirs.split(".", 2)
        vector = len(place) == 3 and place[2] in _VECTORS
        yield Part(theirs, name, box, (1, 1, *shape) if vector else shape)


class RWKV7(Architecture):
    """Its form for Hugging Face."""

    name, class_name, mixer = "rwkv7", "RWKV7ForCausalLM", "R"
    defaults: ClassVar[Mapping[str, Any]] = {
        **dict(zip(_RANKS, (64, 128, 64, 16), strict=True)),
        "head_dim": 64,
        "hidden_act": "sqrelu",
        "norm_eps": _EPSILON,
    }

    def objections(self, cfg: ModelConfig) -> list[Objection]:
        found = []
        if cfg.activation != "relu2":
            found.append(Objection(f"--activation {cfg.activation}", "--activation relu2"))
        if cfg.normalization != "layernorm":
            found.append(Objection("RMS norms", "--normalization layernorm"))
        if cfg.norm_epsilon != _EPSILON:
            found.append(Objection(f"--norm-epsilon {cfg.norm_epsilon:g}", f"--norm-epsilon {_EPSILON:g}"))
        if not cfg.untie_embeddings_and_output_weights:
            found.append(Objection("a head that is its embedding", "--untie-embeddings-and-output-weights"))
        if cfg.add_bias_linear:
            found.append(Objection("biases", "--no-add-bias-linear"))
        if cfg.sub_norm:
            found.append(Objection("sub-norms", "no --sub-norm"))
        return found + self._own_objections(cfg)

    def _own_objections(self, cfg: ModelConfig) -> list[Objection]:
        if math.isclose(cfg.rwkv_head_size * _EPSILON, GROUP_NORM_EPSILON):
            return []
        has = f"--rwkv-head-size {cfg.rwkv_head_size}, whose heads are normed with another epsilon there"
        return [Objection(has, f"--rwkv-head-size {round(GROUP_NORM_EPSILON / _EPSILON)}, or --to rwkv7")]

    def config(self, cfg: ModelConfig) -> dict[str, Any]:
        ranks = lora_ranks(cfg)
        return {
            "hidden_size": cfg.hidden_size,
            "intermediate_size": cfg.ffn_size,
            "hidden_ratio": cfg.ffn_size / cfg.hidden_size,
            "head_dim": cfg.rwkv_head_size,
            "decay_low_rank_dim": ranks.decay,
            "gate_low_rank_dim": ranks.gate,
            "a_low_rank_dim": ranks.iclr,
            "v_low_rank_dim": ranks.value,
            "hidden_act": "sqrelu",
            "norm_first": True,
            "norm_bias": True,
            "norm_eps": cfg.norm_epsilon,
            "attn": None,
            "tie_word_embeddings": False,
        }

    def model(self, given: Given) -> ModelConfig:
        given.demand("hidden_act", ("sqrelu",), "rwkv7 is known with sqrelu")
        given.demand("attn", (None,), "attention layers among RWKV-7's are not read")
        given.demand("tie_word_embeddings", (False,), "rwkv7 is known with a head of its own")
        for name in ("norm_first", "norm_bias"):
            given.demand(name, (True,), "rwkv7 is known with a norm of the embedding, and norms with biases")
        layers, width = given.size("num_hidden_layers"), given.size("hidden_size")
        given.demand("value_dim", (None, width, [width] * layers), "values are known as wide as the model")
        head = given.size("head_dim")
        if not math.isclose(head * given.number("norm_eps"), GROUP_NORM_EPSILON):
            given.demand("norm_eps", (GROUP_NORM_EPSILON / head,), f"heads here are normed with {GROUP_NORM_EPSILON:g}")
        inner = given.get("intermediate_size") or -(-int(width * given.get("hidden_ratio", 4)) // 32) * 32
        return rwkv7_config(
            layers=layers,
            hidden_size=width,
            ffn_hidden_size=inner,
            vocab_size=given.size("vocab_size"),
            num_attention_heads=width // head,
            rwkv_head_size=head,
            norm_epsilon=given.number("norm_eps"),
            rwkv_decay_rank=given.get("decay_low_rank_dim"),
            rwkv_iclr_rank=given.get("a_low_rank_dim"),
            rwkv_value_rank=given.get("v_low_rank_dim"),
            rwkv_gate_rank=given.get("gate_low_rank_dim"),
        )

    def parts(self, cfg: ModelConfig, specs: Mapping[str, ParamSpec]) -> Iterator[Part]:
        for part in pth_parts(cfg, specs):
            theirs, shape = hf_name(part.theirs), part.shape
            transposed = "_lora.lora." in theirs and theirs.endswith(".weight")
            if not theirs.rpartition(".")[2].startswith("x_") or ".ffn." in theirs:
                shape = shape[2:] if len(shape) == 3 else shape
            layer = int(part.ours.split(".")[1]) if part.ours.startswith("layers.") else None
            yield Part(theirs, part.ours, part.box, shape[::-1] if transposed else shape, transposed, layer=layer)


class RWKV7File(RWKV7):
    """RWKV-LM's own form."""

    def _own_objections(self, cfg: ModelConfig) -> list[Objection]:
        return []

    def parts(self, cfg: ModelConfig, specs: Mapping[str, ParamSpec]) -> Iterator[Part]:
        yield from pth_parts(cfg, specs)


def rwkv7_config(layers: int, **fields: Any) -> ModelConfig:
    """A published RWKV-7 model of these sizes."""
    published: dict[str, Any] = {
        "num_layers": layers,
        "hybrid_layer_pattern": "R-" * layers,
        "ffn": "dense",
        "activation": "relu2",
        "normalization": "layernorm",
        "norm_epsilon": _EPSILON,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "none",
    }
    return ModelConfig(**published | fields)


RWKV7_HF, RWKV7_FILE = RWKV7(), RWKV7File()
