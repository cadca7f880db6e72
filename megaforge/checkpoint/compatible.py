"""Is a checkpoint of this model and this tokenizer? The answer names every field that differs, with both values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from megaforge.config.adalora_config import AdaLoraConfig
from megaforge.config.agent_config import AgentConfig
from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.config.peft_config import PeftConfig
from megaforge.config.quant_config import QuantConfig
from megaforge.errors import UserError
from megaforge.registry import PEFT_METHODS

# They shape the weights at step 0 only, and a checkpoint brings its own; or how those are trained.
_INITIAL_ONLY = {
    "rwkv_init",
    "init_std",
    "init_std_scale",
    "bound_tied_embedding",
    "hidden_dropout",
    "attention_dropout",
    "mtp_loss_scaling_factor",
    "mod_loss_coeff",
}
# Without effect on what the model computes once it is trained.
_INITIAL_ONLY |= {"lora_dropout", "lora_bias", "peft_from", "lora_rank_steps", "lora_rank_energy"}
_INITIAL_ONLY |= {field.name for field in dataclasses.fields(AdaLoraConfig)}
_ADAPTERS = {field.name for part in (PeftConfig, AgentConfig) for field in dataclasses.fields(part)}
_QUANTIZERS = {field.name for field in dataclasses.fields(QuantConfig)} - {"sub_norm"}
# None stands for a value that follows from others; compared as what it stands for.
_DERIVED = {
    "ffn_hidden_size": "ffn_size",
    "moe_ffn_hidden_size": "expert_ffn_size",
    "kv_channels": "head_dim",
    "num_query_groups": "query_groups",
}


def describe_run(config: Config, tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of a checkpoint's ``meta`` that :func:`check_compatible` reads: the whole configuration, and the
    tokenizer's ``fingerprint`` (and what else identifies it to people: type, vocabulary size)."""
    described = {"config": dataclasses.asdict(config), "tokenizer": dict(tokenizer) if tokenizer is not None else None}
    return dict(json.loads(json.dumps(described)))


def check_compatible(
    saved: Mapping[str, Any],
    config: Config,
    tokenizer: Mapping[str, Any] | None = None,
    *,
    source: str = "the checkpoint",
) -> None:
    """Refuses to continue from a checkpoint of another model or tokenizer.

    Args:
        saved: a checkpoint's ``meta``, holding what :func:`describe_run` returned.
        config: the configuration of this run; of it only the model's section is compared.
        tokenizer: what was given to :func:`describe_run`, now; None skips the comparison (no tokenizer in use).
        source: what the message calls the checkpoint.

    Raises:
        UserError: naming each field that differs, its saved and its present value.
    """
    try:
        saved_model = dict(saved["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--load {source}: it does not say which model it is of; no training run wrote it") from error
    differences = _model_differences(saved_model, config.model, config.checkpoint.finetune)
    saved_tokenizer = saved.get("tokenizer")
    if tokenizer is not None and saved_tokenizer is not None:
        differences += [
            f"tokenizer {name}: {saved_tokenizer.get(name)} in the checkpoint, {tokenizer.get(name)} here"
            for name in ("type", "vocab_size", "fingerprint", "eod")
            if name in saved_tokenizer  # older checkpoints do not say what ends their documents
            if saved_tokenizer.get(name) != tokenizer.get(name)
        ]
    if differences:
        raise UserError(f"--load {source}: it is of another model or tokenizer: " + "; ".join(differences))


def _model_differences(saved: dict[str, Any], current: ModelConfig, finetune: bool) -> list[str]:
    known = {field.name: field for field in dataclasses.fields(ModelConfig)}
    unknown = saved.keys() - known.keys()
    differences = [f"{name} {saved[name]} in the checkpoint, unknown to this version" for name in unknown]
    # A field younger than the checkpoint: its default is how such checkpoints were trained. JSON has lists for tuples.
    values = {name: saved.get(name, field.default) for name, field in known.items()}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    then = dataclasses.replace(current, **values)
    # The same weights, multiplied otherwise: --finetune may begin or end quantizing them, or put adapters beside them.
    free = _INITIAL_ONLY | _QUANTIZERS | _ADAPTERS if finetune else _INITIAL_ONLY
    for name in known.keys() - free:
        attribute = _DERIVED.get(name, name)
        before, now = getattr(then, attribute), getattr(current, attribute)
        if name == "max_position_embeddings" and None in (before, now):
            continue  # it follows --seq-length, which may change
        if name == "hybrid_layer_pattern":  # its | are layout, not model
            before, now = (None if pattern is None else pattern.replace("|", "") for pattern in (before, now))
        if before != now:
            differences.append(f"--{name.replace('_', '-')} {before} in the checkpoint, {now} here")
    if finetune and saved.get("peft") and current.peft is None:
        differences.append(f"--peft {saved['peft']} in the checkpoint, none here; merge it first (docs/finetuning.md)")
    elif (
        finetune and saved.get("peft") not in (None, current.peft) and PEFT_METHODS.get(saved["peft"]).replaces_weights
    ):
        said = f"--peft {saved['peft']} in the checkpoint, {current.peft} here"
        differences.append(f"{said}; merge it first (docs/finetuning.md)")
    return sorted(differences)
