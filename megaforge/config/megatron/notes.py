"""Where a line that runs in both programs means another model or another run here: a sentence for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megaforge.config.config import Config
from megaforge.config.lr_shapes import RateSettings, RateShape
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import kinds_of
from megaforge.registry import LR_SCHEDULES

# What a line without --config leaves unsaid: our flag, our value, what is meant there.
_UNSAID = (
    ("model.activation", "relu2", "--activation gelu"),
    ("model.add_bias_linear", False, "--add-bias-linear"),
    ("model.normalization", "rmsnorm", "--normalization layernorm"),
    ("model.norm_epsilon", 1e-6, "--norm-epsilon 1e-5"),
    ("model.position_embedding_type", "rope", "--position-embedding-type learned_absolute"),
    ("model.reset_at_document_boundaries", True, "--no-reset-at-document-boundaries"),
    ("model.attention_dropout", 0.0, "--attention-dropout 0.1"),
    ("model.hidden_dropout", 0.0, "--hidden-dropout 0.1"),
    ("optimizer.adam_beta2", 0.95, "--adam-beta2 0.999"),
    ("optimizer.weight_decay", 0.1, "--weight-decay 0.01"),
    ("optimizer.lr_decay_style", "cosine", "--lr-decay-style linear"),
    ("checkpoint.keep_last", 3, "--keep-last 0"),
)
_SIZES = ("model.num_layers", "model.hidden_size", "model.num_attention_heads")
_TIED_OWN_LOGIT = 4.0  # a tied embedding starts at no more than this over the hidden size


def notes(config: Config, origins: Mapping[str, str]) -> tuple[str, ...]:
    """What of this configuration means something else in Megatron-LM, where the command line asked for it."""
    return tuple(_notes(config, origins))


def _notes(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    typed = {key for key, origin in origins.items() if origin.startswith("command line")}
    model, name = config.model, config.name
    if name == "custom" and typed.intersection(_SIZES):
        yield from _unsaid(config, origins)
    if "model.activation" in typed and model.activation == "swiglu" and model.ffn_hidden_size is None:
        there = 64 * (8 * model.hidden_size // 3 // 64)
        yield (
            f"--activation swiglu without --ffn-hidden-size: {model.ffn_size} wide here (4 x hidden size), {there} in "
            f"Megatron-LM; write --ffn-hidden-size {there} for that"
        )
    if "model.activation" in typed and model.activation == "gelu" and not model.add_bias_linear:
        yield (
            "--activation gelu is the tanh form here; Megatron-LM's is the exact one where there are no biases: "
            "--activation gelu_exact"
        )
    tied = not model.untie_embeddings_and_output_weights and model.bound_tied_embedding
    if "model.init_std" in typed and tied and model.init_std > _TIED_OWN_LOGIT / model.hidden_size:
        yield (
            f"--init-std {model.init_std:g}: the tied embedding starts at {_TIED_OWN_LOGIT / model.hidden_size:g} "
            "(4 / hidden size); --untie-embeddings-and-output-weights gives it the std that you ask for, "
            "and so does --no-bound-tied-embedding"
        )
    if "model.moe_expert_capacity_factor" in typed and model.moe_expert_capacity_factor is not None:
        yield (
            f"--moe-expert-capacity-factor {model.moe_expert_capacity_factor:g} is a share of each sequence here, in "
            "training only; in Megatron-LM of a rank's micro-batch, and in evaluation too"
        )
    balancing = model.moe_router_load_balancing_type
    if "model.moe_router_load_balancing_type" in typed and balancing == "global_aux_loss":
        yield (
            "--moe-router-load-balancing-type global_aux_loss uses the load of the previous step; Megatron-LM's that "
            "of the micro-batches so far"
        )
    in_samples = RateSettings.in_samples(config.optimizer, config.length) is not None
    for key in sorted(typed & {"training.rampup_batch_size", "training.step_batch_size_schedule"}):
        if not in_samples:
            yield (
                f"--{key.split('.')[1].replace('_', '-')}: the learning rate's schedule counts steps of any size here; "
                "Megatron-LM's counts samples, as it does here with --train-samples and the --lr-...-samples"
            )
    if "optimizer.lr_decay_style" in typed and origins["optimizer.lr_wsd_decay_style"] == "default":
        shape: RateShape = LR_SCHEDULES.get(config.optimizer.lr_decay_style)
        if "lr_wsd_decay_style" in shape.reads:
            yield (
                f"--lr-decay-style {config.optimizer.lr_decay_style} decays by 1 - sqrt, over a tenth of the run "
                "unless told; in Megatron-LM --lr-wsd-decay-style is exponential unless told"
            )


def _unsaid(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    """Of a line that gives a model's sizes and no preset: what it gets, and what Megatron-LM would take it for."""
    model = config.model
    chosen = {"model.hybrid_layer_pattern", "model.layer_schedule", "model.ffn"}
    if all(origins[key] == "default" for key in chosen):
        yield (
            f"--num-layers {model.num_layers} --hidden-size {model.hidden_size} without --config or a pattern: RWKV-7 "
            f"and attention blocks with {model.num_experts} experts each; for a GPT as in Megatron-LM write "
            "--layer-schedule attention --ffn dense"
        )
    elif origins["model.ffn"] == "default" and origins["model.hybrid_layer_pattern"] == "default":
        yield f"--ffn moe, as none was given: {model.num_experts} experts a block; for a dense FFN write --ffn dense"
    on_purpose = any(origins[key] != "default" for key in ("model.hybrid_layer_pattern", "model.layer_schedule"))
    if on_purpose and not _in_megatron(model):
        return  # Megatron-LM has no such model
    unsaid = [write for key, ours, write in _UNSAID if origins[key] == "default" and _value(config, key) == ours]
    if unsaid:
        yield f"Megatron-LM's defaults, where this line is silent, would be: {' '.join(unsaid)}"


def _in_megatron(model: ModelConfig) -> bool:
    return all(kind.in_megatron for kind in kinds_of(model))


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
