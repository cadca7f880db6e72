"""Megatron-LM's arguments, as a checkpoint keeps them, and our configuration of the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import ahead_of, blocks_of, kinds_of
from megaforge.errors import UserError
from megaforge.registry import LAYER_KINDS

# Argument -> values at which the model has no such part. What is not listed changes no function of the weights.
_LACKING: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "mtp_num_layers": (0,),
    "moe_shared_expert_gate": (False,),
    "moe_latent_size": (0,),
    "moe_apply_probs_on_input": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "window_size": (),
    "softmax_type": ("vanilla",),
    "hybrid_override_pattern": (),
    "hybrid_layer_pattern": (),
    "is_hybrid_model": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
    "apply_residual_connection_post_layernorm": (False,),
    "no_rope_freq": (),
    "experimental_attention_variant": (),
    "linear_attention_type": (),
    "heterogeneous_layers_config_path": (),
    "embedding_multiplier": (1, 1.0),
}
_POSITIONS = ("rope", "learned_absolute", "none")


def config_of(args: Mapping[str, Any], source: str) -> ModelConfig:
    """The model that ``args`` describe.

    Raises:
        UserError: it has parts that we lack; the text names them.
    """
    lacking = [
        f"--{name.replace('_', '-')} {value}"
        for name, fine in _LACKING.items()
        if (value := args.get(name)) is not None and value not in fine
    ]
    positions = _positions(args)
    if positions not in _POSITIONS:
        lacking.append(f"--position-embedding-type {positions}")
    if (norm := str(args.get("normalization") or "LayerNorm").lower()) not in ("rmsnorm", "layernorm"):
        lacking.append(f"--normalization {norm}")
    if lacking:
        raise UserError(f"{source}: its model has parts that are not available here: {', '.join(lacking)}")
    try:
        return _config(args, positions)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: its arguments lack or have an odd {error}") from error


def _activation(args: Mapping[str, Any]) -> str:
    """As ``--activation``. GELU is the tanh form only in the kernel that adds a bias, or as openai_gelu."""
    if args.get("swiglu"):
        return "swiglu"
    if args.get("squared_relu"):
        return "relu2"
    fused = args.get("add_bias_linear", True) and args.get("bias_gelu_fusion", True)
    return "gelu" if args.get("openai_gelu") or fused else "gelu_exact"


def _positions(args: Mapping[str, Any]) -> str:
    if args.get("use_rotary_position_embeddings"):
        return "rope"
    return str(args.get("position_embedding_type") or "learned_absolute")


def _config(args: Mapping[str, Any], positions: str) -> ModelConfig:
    layers, hidden, heads = (int(args[name]) for name in ("num_layers", "hidden_size", "num_attention_heads"))
    rows = int(args["padded_vocab_size"])
    grouped = args.get("group_query_attention")
    experts = int(args.get("num_experts") or 0)
    sparse = _sparse_layers(args.get("moe_layer_freq", 1), layers) if experts else [False] * layers
    own = {
        "num_layers": layers,
        "hybrid_layer_pattern": "".join("*E" if each else "*-" for each in sparse),
        "hidden_size": hidden,
        **_inner_widths(args, sparse, 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": int(args["num_query_groups"]) if grouped else heads,
        "kv_channels": int(args.get("kv_channels") or hidden // heads),
        "ffn": "moe" if any(sparse) else "dense",
        "activation": _activation(args),
        "normalization": str(args.get("normalization") or "LayerNorm").lower(),
        "norm_epsilon": float(args.get("norm_epsilon", 1e-5)),
        "untie_embeddings_and_output_weights": bool(args.get("untie_embeddings_and_output_weights")),
        "position_embedding_type": positions,
        "add_bias_linear": bool(args.get("add_bias_linear", True)),
        "add_qkv_bias": bool(args.get("add_qkv_bias")) and not args.get("add_bias_linear", True),
        "qk_layernorm": bool(args.get("qk_layernorm")),
        "attention_dropout": float(args.get("attention_dropout") or 0.0),
        "hidden_dropout": float(args.get("hidden_dropout") or 0.0),
        **(_rotation(args) if positions == "rope" else {}),
        "max_position_embeddings": args.get("max_position_embeddings"),
        "reset_at_document_boundaries": bool(args.get("reset_attention_mask") and args.get("reset_position_ids")),
        # Megatron's softmax is over the padding, too.
        "vocab_size": rows,
        "make_vocab_size_divisible_by": 128 if rows % 128 == 0 else 1,
    }
    return ModelConfig(**own, **(_experts(args, experts) if experts else {}))


def _rotation(args: Mapping[str, Any]) -> dict[str, Any]:
    factor = float(args.get("rotary_seq_len_interpolation_factor") or 1)
    scaled = bool(args.get("use_rope_scaling"))
    return {
        "rotary_base": float(args.get("rotary_base") or 10000),
        "rotary_percent": float(args.get("rotary_percent", 1.0)),
        "rotary_interleaved": bool(args.get("rotary_interleaved")),
        "rotary_seq_len_interpolation_factor": None if factor == 1 else factor,
        "use_rope_scaling": scaled,
        **({"rope_scaling_factor": float(args.get("rope_scaling_factor") or 8.0)} if scaled else {}),
    }


def _inner_widths(args: Mapping[str, Any], sparse: list[bool], default: int) -> dict[str, int | None]:
    dense = int(args.get("ffn_hidden_size") or default)
    experts = int(args.get("moe_ffn_hidden_size") or dense) if any(sparse) else dense
    if all(sparse) or experts == dense:
        return {"ffn_hidden_size": experts}
    return {"ffn_hidden_size": dense, "moe_ffn_hidden_size": experts}


def _sparse_layers(frequency: Any, layers: int) -> list[bool]:
    """Which layers have experts: every so many from the first, or as a list says."""
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(layers)]
    if not isinstance(frequency, list | tuple) or len(frequency) != layers:
        raise ValueError(f"moe_layer_freq {frequency!r}")
    return [bool(each) for each in frequency]


def _experts(args: Mapping[str, Any], experts: int) -> dict[str, Any]:
    copied: dict[str, Callable[[Any], Any]] = {
        "moe_router_topk": int,
        "moe_router_score_function": str,
        "moe_router_pre_softmax": bool,
        "moe_router_topk_scaling_factor": float,
        "moe_router_num_groups": int,
        "moe_router_group_topk": int,
        "moe_router_enable_expert_bias": bool,
        "moe_router_bias_update_rate": float,
        "moe_shared_expert_intermediate_size": int,
        "moe_expert_capacity_factor": float,
        "moe_token_drop_policy": str,
    }
    balancing = args.get("moe_router_load_balancing_type", "aux_loss")
    known = {"aux_loss": "seq_aux_loss", "seq_aux_loss": "seq_aux_loss", "global_aux_loss": "global_aux_loss"}
    return {
        "num_experts": experts,
        "moe_router_load_balancing_type": known.get(str(balancing), "none"),
        "moe_aux_loss_coeff": float(args.get("moe_aux_loss_coeff") or 0.0),
        "moe_z_loss_coeff": float(args.get("moe_z_loss_coeff") or 0.0),
        **{name: read(args[name]) for name, read in copied.items() if args.get(name) is not None},
    }


_COPIED = (
    *("hidden_size", "num_attention_heads", "norm_epsilon", "untie_embeddings_and_output_weights", "rotary_percent"),
    *("position_embedding_type", "rotary_interleaved", "rotary_seq_len_interpolation_factor", "use_rope_scaling"),
    *("rope_scaling_factor", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "make_vocab_size_divisible_by"),
    *("attention_dropout", "hidden_dropout"),
)
_COPIED_MOE = (
    *("num_experts", "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_z_loss_coeff"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk", "moe_aux_loss_coeff"),
    *("moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_expert_capacity_factor"),
    *("moe_token_drop_policy", "moe_shared_expert_intermediate_size", "moe_router_load_balancing_type"),
)


def args_of(config: Config) -> dict[str, Any]:
    """The arguments with which Megatron-LM builds the model of ``config``, of one rank.

    Raises:
        UserError: it has parts that Megatron's GPT lacks; the text names them.
    """
    cfg = config.model
    if lacking := _objections(cfg):
        raise UserError(
            f"--to megatron: the model has {', and '.join(lacking)}, which Megatron's GPT does not know; "
            "--save FILE.safetensors holds every model"
        )
    sparse = [int(block.ffn is LAYER_KINDS.get("E")) for block in blocks_of(cfg)]
    args = {name: getattr(cfg, name) for name in _COPIED}
    args |= {
        "num_layers": len(sparse),
        "ffn_hidden_size": cfg.ffn_size,
        "kv_channels": cfg.head_dim,
        "group_query_attention": cfg.query_groups < cfg.num_attention_heads,
        "num_query_groups": cfg.query_groups,
        "max_position_embeddings": cfg.max_position_embeddings or config.data.seq_length,
        "seq_length": config.data.seq_length,
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[cfg.normalization],
        "apply_layernorm_1p": False,
        "rotary_base": int(cfg.rotary_base) if cfg.rotary_base == int(cfg.rotary_base) else cfg.rotary_base,
        "use_rotary_position_embeddings": cfg.position_embedding_type == "rope",
        "add_position_embedding": cfg.position_embedding_type == "learned_absolute",
        "swiglu": cfg.activation == "swiglu",
        "squared_relu": cfg.activation == "relu2",
        "openai_gelu": cfg.activation == "gelu" and not cfg.add_bias_linear,
        "bias_gelu_fusion": cfg.activation == "gelu" and cfg.add_bias_linear,
        "vocab_size": cfg.vocab_size,
        "padded_vocab_size": cfg.padded_vocab_size(),
        "reset_position_ids": cfg.reset_at_document_boundaries,
        "reset_attention_mask": cfg.reset_at_document_boundaries,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
    }
    if any(sparse):
        args |= {name: getattr(cfg, name) for name in _COPIED_MOE}
        args["moe_ffn_hidden_size"] = cfg.expert_ffn_size
        args["moe_layer_freq"] = 1 if all(sparse) else sparse
    return args


def _objections(cfg: ModelConfig) -> list[str]:
    """What the model has that Megatron's GPT lacks."""
    attention, ffns = LAYER_KINDS.get("*"), (LAYER_KINDS.get("-"), LAYER_KINDS.get("E"))
    found = []
    for block in dict.fromkeys(blocks_of(cfg)):
        if block.mixer is not attention:
            found.append(f"{block.mixer.title}s")
        if block.ffn not in ffns:
            found.append("blocks without an FFN" if block.ffn is None else f"{block.ffn.title}s")
    if ahead_of(cfg):
        found.append("further predictions (--mtp-num-layers)")
    if cfg.mod_capacity_factor is not None:
        found.append("blocks that not every token goes through (--mod-capacity-factor)")
    if cfg.activation == "gated_relu2":
        found.append(f"--activation {cfg.activation}")
    if cfg.add_bias_linear and LAYER_KINDS.get("E") in kinds_of(cfg):
        found.append("biases beside experts, which have none here")
    if cfg.sub_norm:
        found.append("--sub-norm")
    if cfg.all_converters:
        found.append(f"weights that are quantized ({' '.join(cfg.all_converters)})")
    if cfg.normalization not in ("rmsnorm", "layernorm"):
        found.append(f"--normalization {cfg.normalization}")
    return list(dict.fromkeys(found))
