"""What attention models have in common: positions, norms, names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from megaforge.checkpoint.architectures.base import Architecture, Given, Objection, Part
from megaforge.checkpoint.attention_models import Piece, pieces
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.nn.rope_scaling import HIGH_FREQUENCY_FACTOR, LOW_FREQUENCY_FACTOR, ORIGINAL_LENGTH
from megaforge.parallel.param_spec import ParamSpec

_ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    **{role: f"self_attn.{role}_proj" for role in "qkvo"},
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}


# What a model has or has not, and an architecture as well: fields of ModelConfig.
FEATURES = ("sub_norm", "qk_layernorm", "add_qkv_bias", "rotary_interleaved")
_BANDS = {
    "low_freq_factor": LOW_FREQUENCY_FACTOR,
    "high_freq_factor": HIGH_FREQUENCY_FACTOR,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}


class AttentionArchitecture(Architecture):
    """An architecture of attention blocks with RMS norms and rotary positions; the members say what is its own.

    Attributes:
        activations: ours for each ``hidden_act`` of theirs.
        in_layer: names of modules in a layer by role, where they are not Llama's; ``{e}`` is the expert.
        biases: whether projections may have biases.
        features: those of :data:`FEATURES` that it has.
    """

    activations: ClassVar[Mapping[str, str]] = {"silu": "swiglu"}
    in_layer: ClassVar[Mapping[str, str]] = {}
    biases: ClassVar[bool] = False
    features: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}

    def objections(self, cfg: ModelConfig) -> list[Objection]:
        found = []
        if cfg.activation not in self.activations.values():
            found.append(Objection(f"--activation {cfg.activation}", f"--activation {self._activations_here()}"))
        if cfg.normalization != "rmsnorm":
            found.append(Objection("layer norms", "--normalization rmsnorm"))
        if cfg.position_embedding_type != "rope" or cfg.rotary_percent != 1:
            has = "positions other than rotary ones of whole heads"
            found.append(Objection(has, "--position-embedding-type rope"))
        for name in FEATURES:
            if getattr(cfg, name) != (name in self.features):
                flag = f"--{name.replace('_', '-')}"
                found.append(Objection(flag, f"no {flag}") if getattr(cfg, name) else Objection(f"no {flag}", flag))
        if cfg.use_rope_scaling and cfg.rotary_seq_len_interpolation_factor:
            has = "--use-rope-scaling with --rotary-seq-len-interpolation-factor"
            found.append(Objection(has, "one of the two"))
        if cfg.add_bias_linear and not self.biases:
            found.append(Objection("biases", "--no-add-bias-linear"))
        return found

    def _activations_here(self) -> str:
        return " or ".join(dict.fromkeys(self.activations.values()))

    def config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "hidden_size": cfg.hidden_size,
            "intermediate_size": cfg.ffn_size,
            "num_attention_heads": cfg.num_attention_heads,
            "num_key_value_heads": cfg.query_groups,
            "head_dim": cfg.head_dim,
            "hidden_act": next(theirs for theirs, ours in self.activations.items() if ours == cfg.activation),
            "rms_norm_eps": cfg.norm_epsilon,
            **_rope_config(cfg),
            "tie_word_embeddings": not cfg.untie_embeddings_and_output_weights,
            **self.own_config(cfg),
        }

    def own_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """Settings that not all of these architectures have."""
        return {}

    def model(self, given: Given) -> ModelConfig:
        given.demand(
            "hidden_act", tuple(self.activations), f"{self.name} is known with {' or '.join(self.activations)}"
        )
        heads, layers = given.size("num_attention_heads"), given.size("num_hidden_layers")
        values: dict[str, Any] = {
            "num_layers": layers,
            "hybrid_layer_pattern": f"{self.mixer}{self.ffn}" * layers,
            "hidden_size": given.size("hidden_size"),
            "ffn_hidden_size": given.size("intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": given.get("num_key_value_heads", heads),
            "kv_channels": given.get("head_dim", given.size("hidden_size") // heads),
            "ffn": "dense",
            "activation": self.activations[given.get("hidden_act")],
            "norm_epsilon": given.number("rms_norm_eps"),
            "untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", False),
            "vocab_size": given.size("vocab_size"),
            "max_position_embeddings": given.get("max_position_embeddings"),
            **positions(given),
        }
        return ModelConfig(**values | self.own_model(given))

    def own_model(self, given: Given) -> dict[str, Any]:
        """Fields of :class:`ModelConfig` that not all of these architectures have."""
        return {}

    def parts(self, cfg: ModelConfig, specs: Mapping[str, ParamSpec]) -> Iterator[Part]:
        for piece in pieces(cfg, specs):
            spec, kind = specs[piece.name], piece.name.rpartition(".")[2]
            box = piece.box(spec.shape)
            shape = tuple(end - start for start, end in box)[0 if piece.expert is None else 1 :]
            theirs = f"{self._module(piece)}.{kind}"
            yield Part(theirs, piece.name, box, shape, number=piece.part, layer=piece.layer)

    def _module(self, piece: Piece) -> str:
        if piece.layer is None:
            return _ENDS[piece.role]
        module = self.in_layer.get(piece.role) or _IN_LAYER[piece.role]
        return f"model.layers.{piece.layer}.{module.format(e=piece.expert)}"


def positions(given: Given) -> dict[str, Any]:
    """Fields of :class:`ModelConfig` for what ``config.json`` says of rotary positions, in the words of transformers 4
    (``rope_scaling`` beside ``rope_theta``) or 5 (``rope_parameters``).

    Raises:
        UserError: of a kind that we do not have.
    """
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise given.odd("rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3", "linear"):
        raise UserError(f"{given.path}: rope_type {kind}: known are default, llama3 and linear")
    if rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1)) != 1:
        raise UserError(f"{given.path}: partial_rotary_factor: only positions of whole heads are known")
    base = {"rotary_base": float(rope.get("rope_theta") or given.number("rope_theta"))}
    if kind == "default":
        return base
    factor = rope.get("factor")
    if not isinstance(factor, int | float):
        raise UserError(f"{given.path}: rope_type {kind} without a factor")
    if kind == "linear":
        return base | {"rotary_seq_len_interpolation_factor": float(factor)}
    for name, value in _BANDS.items():
        if rope.get(name, value) != value:
            raise UserError(f"{given.path}: rope_type llama3 with {name} {rope[name]}: here it is {value}")
    return base | {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}


def _rope_config(cfg: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` says of rotary positions, in the words of both versions."""
    base = {"rope_theta": cfg.rotary_base}
    if cfg.use_rope_scaling:
        scaling: dict[str, Any] = {"rope_type": "llama3", "factor": cfg.rope_scaling_factor, **_BANDS}
    elif cfg.rotary_seq_len_interpolation_factor:
        scaling = {"rope_type": "linear", "factor": cfg.rotary_seq_len_interpolation_factor}
    else:
        return base | {"rope_parameters": {"rope_type": "default", **base}}
    return base | {"rope_parameters": {**scaling, **base}, "rope_scaling": {**scaling, **base}}
