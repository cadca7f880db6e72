"""GPT-2 (Radford et al., 2019), as transformers has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from megaforge.checkpoint.architectures.base import Architecture, Given, Objection, Part
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of
from megaforge.parallel.param_spec import ParamSpec

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
_NORMS = {"ln_1": "mixer_norm", "ln_2": "ffn_norm"}
_LINEARS = {"attn.c_attn": "mixer.qkv", "attn.c_proj": "mixer.output", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"}
_KINDS = ("weight", "bias")


class GPT2(Architecture):
    """Learned positions, layer norms, biases, GELU without a gate; matrices are stored transposed."""

    name, class_name, optional_prefix = "gpt2", "GPT2LMHeadModel", "transformer."
    unread: ClassVar[tuple[str, ...]] = (".attn.bias", ".attn.masked_bias")
    defaults: ClassVar[Mapping[str, Any]] = {
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    }

    def objections(self, cfg: ModelConfig) -> list[Objection]:
        wanted = (
            (cfg.activation in _ACTIVATIONS.values(), f"--activation {cfg.activation}", "--activation gelu"),
            (cfg.normalization == "layernorm", "RMS norms", "--normalization layernorm"),
            (
                cfg.position_embedding_type == "learned_absolute",
                f"--position-embedding-type {cfg.position_embedding_type}",
                "--position-embedding-type learned_absolute",
            ),
            (cfg.add_bias_linear, "no biases", "--add-bias-linear"),
            (cfg.query_groups == cfg.num_attention_heads, "grouped queries", "no --num-query-groups"),
            (
                cfg.num_attention_heads * cfg.head_dim == cfg.hidden_size,
                "heads that are not as wide as the model",
                "no --kv-channels",
            ),
            (not cfg.sub_norm, "--sub-norm", "no --sub-norm"),
            (not cfg.qk_layernorm, "--qk-layernorm", "no --qk-layernorm"),
        )
        return [Objection(has, instead) for fine, has, instead in wanted if not fine]

    def config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "n_embd": cfg.hidden_size,
            "n_head": cfg.num_attention_heads,
            "n_layer": len(blocks_of(cfg)),
            "n_inner": cfg.ffn_size,
            "n_positions": cfg.max_position_embeddings,
            "activation_function": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == cfg.activation),
            "layer_norm_epsilon": cfg.norm_epsilon,
            "tie_word_embeddings": not cfg.untie_embeddings_and_output_weights,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        }

    def model(self, given: Given) -> ModelConfig:
        given.demand("activation_function", tuple(_ACTIVATIONS), f"gpt2 is known with {' or '.join(_ACTIVATIONS)}")
        given.demand("scale_attn_weights", (True,), "scores here are divided by the root of a head's width")
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            given.demand(name, (False,), "attention here has no such thing")
        width, layers = given.size("n_embd"), given.size("n_layer")
        return ModelConfig(
            num_layers=layers,
            hybrid_layer_pattern="*-" * layers,
            hidden_size=width,
            ffn_hidden_size=given.get("n_inner") or 4 * width,
            num_attention_heads=given.size("n_head"),
            ffn="dense",
            activation=_ACTIVATIONS[given.get("activation_function")],
            normalization="layernorm",
            norm_epsilon=given.number("layer_norm_epsilon"),
            position_embedding_type="learned_absolute",
            max_position_embeddings=given.size("n_positions"),
            add_bias_linear=True,
            untie_embeddings_and_output_weights=not given.get("tie_word_embeddings", True),
            vocab_size=given.size("vocab_size"),
        )

    def parts(self, cfg: ModelConfig, specs: Mapping[str, ParamSpec]) -> Iterator[Part]:
        vocabulary = ((0, cfg.vocab_size or cfg.padded_vocab_size()), (0, cfg.hidden_size))
        table = (vocabulary[0][1], cfg.hidden_size)
        yield Part("transformer.wte.weight", "embedding.weight", vocabulary, table)
        yield _whole("transformer.wpe.weight", "positions.weight", specs)
        for i in range(len(blocks_of(cfg))):
            theirs, ours = f"transformer.h.{i}", f"layers.{i}"
            for kind in _KINDS:
                for module, own in _NORMS.items():
                    yield _whole(f"{theirs}.{module}.{kind}", f"{ours}.{own}.{kind}", specs, i)
                for module, own in _LINEARS.items():
                    yield _whole(f"{theirs}.{module}.{kind}", f"{ours}.{own}.{kind}", specs, i, kind == "weight")
        for kind in _KINDS:
            yield _whole(f"transformer.ln_f.{kind}", f"final_norm.{kind}", specs)
        if cfg.untie_embeddings_and_output_weights:
            yield Part("lm_head.weight", "head.weight", vocabulary, table)


def _whole(
    theirs: str, ours: str, specs: Mapping[str, ParamSpec], layer: int | None = None, transposed: bool = False
) -> Part:
    shape = specs[ours].shape
    box = tuple((0, size) for size in shape)
    return Part(theirs, ours, box, shape[::-1] if transposed else shape, transposed, layer=layer)


GPT2_HF = GPT2()
