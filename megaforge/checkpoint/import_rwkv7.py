"""Published RWKV-7 weights (BlinkDL's ``.pth`` files of x070 models) as a checkpoint of ours, value for value."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import megaforge
from megaforge.checkpoint.checkpoint import save_checkpoint
from megaforge.checkpoint.compatible import describe_run
from megaforge.checkpoint.shards import TensorEntry
from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.parameter_count import declared_parameters
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec

MODEL_FILE = "model.yaml"

_TOP = {
    "emb": "embedding",
    "blocks.0.ln0": "embedding_norm",
    "ln_out": "final_norm",
    "head": "head",
}
_BLOCK = {
    "ln1": "mixer_norm",
    "ln2": "ffn_norm",
    "att": "mixer",
    "ffn.key": "ffn.up",
    "ffn.value": "ffn.down",
    "ffn": "ffn",
}
_LOW_RANK = {f"att.{letter}{half}" for letter in "wavg" for half in "12"}  # modules here, tensors there
# RWKV-LM's layer 0 has them, and neither trains nor reads them: it makes the values that others mix in.
_UNUSED = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


def our_name(name: str) -> str | None:
    """RWKV-LM's parameter name in ours; None for what its model never uses.

    Raises:
        KeyError: it is not a parameter of RWKV-7.
    """
    if name in _UNUSED:
        return None
    for theirs, ours in _TOP.items():
        if name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    parts = name.split(".", 2)
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdecimal():
        raise KeyError(name)
    index, rest = parts[1:]
    matches = [module for module in _BLOCK if rest.startswith(f"{module}.")]
    if not matches:
        raise KeyError(name)
    module = max(matches, key=len)
    weight = ".weight" if rest in _LOW_RANK else ""
    return f"layers.{index}.{_BLOCK[module]}{rest[len(module) :]}{weight}"


def config_of(weights: Mapping[str, Tensor]) -> ModelConfig:
    """The model that these RWKV-LM ``weights`` are of, told from their names and shapes.

    Raises:
        UserError: they are not RWKV-7's.
    """
    needed = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.att.r_k", "blocks.0.att.w1", "blocks.0.ffn.key.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise UserError(f"these are not RWKV-7 (x070) weights: no tensor is called {', '.join(missing)}")
    vocab, hidden = weights["emb.weight"].shape
    heads, head_size = weights["blocks.0.att.r_k"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    value_lora = weights.get("blocks.1.att.v1")
    return ModelConfig(
        num_layers=layers,
        hybrid_layer_pattern="R-" * layers,
        hidden_size=hidden,
        ffn_hidden_size=weights["blocks.0.ffn.key.weight"].shape[0],
        num_attention_heads=heads,
        ffn="dense",
        activation="relu2",
        normalization="layernorm",
        norm_epsilon=1e-5,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="none",
        vocab_size=vocab,
        rwkv_head_size=head_size,
        rwkv_decay_rank=weights["blocks.0.att.w1"].shape[1],
        rwkv_iclr_rank=weights["blocks.0.att.a1"].shape[1],
        rwkv_value_rank=None if value_lora is None else value_lora.shape[1],
        rwkv_gate_rank=weights["blocks.0.att.g1"].shape[1],
    )


def convert_rwkv7(weights: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """RWKV-LM's ``weights`` as ours.

    Returns:
        The model's configuration and its global tensors by global name, fp32 (fp64 where they come as such), the
        vocabulary padded with zero rows.

    Raises:
        UserError: a tensor is missing, unknown, or of a shape that the others contradict.
    """
    cfg = config_of(weights)
    specs, converted = declared_parameters(cfg), {}
    for theirs, value in weights.items():
        try:
            name = our_name(theirs)
        except KeyError:
            name = theirs
        if name is None:
            continue
        if name not in specs:
            raise UserError(
                f"{theirs} is not a parameter of RWKV-7 (x070); variants of the architecture are not supported"
            )
        converted[name] = _reshaped(theirs, value, specs[name], cfg)
    missing = sorted(specs.keys() - converted.keys())
    if missing:
        raise UserError(f"the weights are incomplete: nothing for {', '.join(missing[:5])} ({len(missing)} in all)")
    return cfg, converted


def _reshaped(theirs: str, value: Tensor, spec: ParamSpec, cfg: ModelConfig) -> Tensor:
    """``value`` in the declared shape: their vectors are [1, 1, C], and their vocabulary is not padded."""
    shape = list(spec.shape)
    if spec.name in ("embedding.weight", "head.weight"):
        shape[0] = cfg.vocab_size or shape[0]
    if [size for size in value.shape if size > 1] != [size for size in shape if size > 1]:
        raise UserError(f"{theirs} has the shape {tuple(value.shape)}, but the other tensors say {tuple(shape)}")
    value = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32).reshape(shape)
    if shape[0] == spec.shape[0]:
        return value.contiguous()
    return torch.cat([value, value.new_zeros(spec.shape[0] - shape[0], *shape[1:])])


def read_pth(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file, read without running any code from it.

    Raises:
        UserError: it is missing, damaged, or holds something else than named tensors.
    """
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file") from error
    except Exception as error:  # a damaged or foreign file makes torch raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a file of tensors that torch can read safely ({reason})") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file}: holds something else than named tensors; give the published .pth of the model")
    return weights


def import_rwkv7(
    file: str | Path, directory: str | Path, config: Config | None = None, tokenizer: Mapping[str, Any] | None = None
) -> Path:
    """Writes the published weights ``file`` as a checkpoint of step 0 below ``directory``, and beside it the model's
    configuration (``model.yaml``), which a run that continues from it takes as ``--config``.

    Args:
        file: ``.pth``.
        directory: what ``--load`` then takes.
        config: other sections of the configuration to record (tokenizer, sequence length).
        tokenizer: its identity, as a checkpoint records it.

    Returns:
        The checkpoint.

    Raises:
        UserError: naming ``file`` and what is wrong with it.
    """
    weights = read_pth(file)
    try:
        cfg, tensors = convert_rwkv7(weights)
        config = dataclasses.replace(config or Config(), name="rwkv7", model=cfg)
        config.validate()
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if tokenizer is not None and int(tokenizer["vocab_size"]) > (cfg.vocab_size or 0):
        raise UserError(
            f"--tokenizer-model {tokenizer['model']}: has {tokenizer['vocab_size']} ids, "
            f"the model knows {cfg.vocab_size}"
        )
    specs = declared_parameters(cfg)
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    meta = describe_run(config, tokenizer) | {
        "megaforge_version": megaforge.__version__,
        "source": {"format": "rwkv7", "file": Path(file).name, "sha256": digest},
    }
    entries = [TensorEntry(name, specs[name], tensor) for name, tensor in tensors.items()]
    path = save_checkpoint(directory, 0, entries, meta, ParallelContext.single())
    (Path(directory) / MODEL_FILE).write_text(_as_yaml(cfg, Path(file).name), encoding="utf-8")
    return path


def _as_yaml(cfg: ModelConfig, source: str) -> str:
    """``cfg`` as a file for ``--config``: what differs from the defaults."""
    default = dataclasses.asdict(ModelConfig())
    model = {name: value for name, value in dataclasses.asdict(cfg).items() if value != default[name]}
    return f"# The model of {source}, for --config.\n" + yaml.safe_dump({"model": model}, sort_keys=False)
