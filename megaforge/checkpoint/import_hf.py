"""Attention models in Hugging Face's form as checkpoints of ours: BitNet's, and Llama's and Arcee's with its BitNet
quantizer or without one."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import megaforge
from megaforge.checkpoint.attention_models import Piece, pieces
from megaforge.checkpoint.checkpoint import save_checkpoint
from megaforge.checkpoint.compatible import describe_run
from megaforge.checkpoint.export_hf import their_module
from megaforge.checkpoint.import_rwkv7 import MODEL_FILE
from megaforge.checkpoint.safetensors_file import SafetensorsFile
from megaforge.checkpoint.shards import TensorEntry
from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.errors import DamagedCheckpointError, UserError
from megaforge.json_text import parse_json
from megaforge.models.parameter_count import declared_parameters
from megaforge.parallel.context import ParallelContext
from megaforge.quant.formats.hf_bitnet import unpack_rows

_ACTIVATIONS = {
    ("bitnet", "relu2"): "gated_relu2",
    ("bitnet", "silu"): "swiglu",
    ("llama", "silu"): "swiglu",
    ("arcee", "relu2"): "relu2",
}


class _Folder:
    """The tensors of a directory's safetensors files, by name, and its configuration."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        try:
            self.config = dict(parse_json((self.path / "config.json").read_bytes()))
            files = [SafetensorsFile(file) for file in sorted(self.path.glob("*.safetensors"))]
        except OSError as error:
            raise UserError(f"{self.path}: its config.json cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, DamagedCheckpointError) as error:
            raise UserError(f"{self.path}: {error}") from error
        self.files = {slot.name: file for file in files for slot in file.slots()}
        if not self.files:
            raise UserError(f"{self.path}: there are no weights in it (*.safetensors)")

    def tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.path}: the weight {name} is missing")
        return self.files[name].tensor(name)

    def is_packed(self, module: str) -> bool:
        return f"{module}.weight_scale" in self.files


def config_of(folder: str | Path) -> ModelConfig:
    """The model that a directory's ``config.json`` describes, but for which of its matrices are quantized.

    Raises:
        UserError: it is of an architecture that we do not have.
    """
    return _config(_Folder(folder))


def _config(folder: _Folder) -> ModelConfig:
    given, path = folder.config, folder.path
    kind, act = str(given.get("model_type")), str(given.get("hidden_act", "silu"))
    if (kind, act) not in _ACTIVATIONS:
        known = ", ".join(f"{one} with {other}" for one, other in _ACTIVATIONS)
        raise UserError(f"{path}: model_type {kind} with hidden_act {act} is not one of {known}")
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(
            f"{path}: rope_type {rope.get('rope_type', rope.get('type'))}: only default positions are known"
        )
    if given.get("attention_bias", False) != given.get("mlp_bias", kind == "bitnet" and given.get("attention_bias")):
        raise UserError(f"{path}: attention_bias and mlp_bias differ; here both kinds of layers have biases or none")
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if odd := next((name for name in needed if type(given.get(name)) is not int or given[name] < 1), None):
        raise UserError(f"{path}: its config.json lacks or has an odd {odd}: {given.get(odd)!r}")
    try:
        return ModelConfig(
            num_layers=given["num_hidden_layers"],
            hybrid_layer_pattern="*-" * given["num_hidden_layers"],
            hidden_size=given["hidden_size"],
            ffn_hidden_size=given["intermediate_size"],
            num_attention_heads=given["num_attention_heads"],
            num_query_groups=given.get("num_key_value_heads") or given["num_attention_heads"],
            kv_channels=given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
            ffn="dense",
            activation=_ACTIVATIONS[kind, act],
            norm_epsilon=given["rms_norm_eps"],
            untie_embeddings_and_output_weights=not given.get("tie_word_embeddings", False),
            rotary_base=float(rope.get("rope_theta") or given.get("rope_theta") or 10000.0),
            add_bias_linear=bool(given.get("attention_bias", False)),
            vocab_size=given["vocab_size"],
            sub_norm=kind == "bitnet",
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its config.json lacks or has an odd {error}") from error


def import_hf(
    directory: str | Path, save: str | Path, config: Config | None = None, tokenizer: Mapping[str, Any] | None = None
) -> Path:
    """Writes the weights of ``directory`` as a checkpoint of step 0 below ``save``, and beside it ``model.yaml``, which
    a run that continues from it takes as ``--config``.

    A packed matrix has the codes c and one scale s. Its weights here are c s / mean|c|, whose ternary codes are c and
    whose mean magnitude is s: the model that is trained on is the one that was published.

    Args:
        config: other sections of the configuration to record.
        tokenizer: its identity, as a checkpoint records it.

    Raises:
        UserError: naming ``directory`` and what is wrong with it.
    """
    folder = _Folder(directory)
    cfg = _quantized(_config(folder), folder)
    config = config or Config()
    length = folder.config.get("max_position_embeddings") or config.data.seq_length
    data = dataclasses.replace(config.data, seq_length=length)
    config = dataclasses.replace(config, name=folder.path.name, model=cfg, data=data)
    config.validate()
    specs = declared_parameters(cfg)
    by_name: dict[str, list[Tensor]] = defaultdict(list)
    for piece in _pieces(cfg):
        by_name[piece.name].append(_read(folder, piece))
    entries = []
    for name, spec in specs.items():
        value = torch.cat(by_name[name])
        if name in ("embedding.weight", "head.weight") and len(value) == cfg.vocab_size:
            value = torch.cat([value, value.new_zeros(spec.shape[0] - value.shape[0], spec.shape[1])])
        if tuple(value.shape) != spec.shape:
            raise UserError(
                f"{folder.path}: {name} has the shape {tuple(value.shape)}, its config.json says {spec.shape}"
            )
        entries.append(TensorEntry(name, spec, value.contiguous()))
    meta = describe_run(config, tokenizer) | {
        "megaforge_version": megaforge.__version__,
        "source": {"format": "hf", "model_type": folder.config["model_type"], "directory": folder.path.name},
    }
    path = save_checkpoint(save, 0, entries, meta, ParallelContext.single())
    default = dataclasses.asdict(ModelConfig())
    model = {key: value for key, value in dataclasses.asdict(cfg).items() if value != default[key]}
    model = {key: list(value) if isinstance(value, tuple) else value for key, value in model.items()}
    text = f"# The model of {folder.path.name}, for --config.\n" + yaml.safe_dump({"model": model}, sort_keys=False)
    (Path(save) / MODEL_FILE).write_text(text, encoding="utf-8")
    return path


def _pieces(cfg: ModelConfig) -> list[Piece]:
    return list(pieces(cfg, declared_parameters(cfg)))


def _quantized(cfg: ModelConfig, folder: _Folder) -> ModelConfig:
    """``cfg`` with those matrices ternary that are packed in the folder."""
    method = (folder.config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "bitnet"):
        raise UserError(f"{folder.path}: quant_method {method}: only bitnet and no quantization are known")
    matrices = [piece for piece in _pieces(cfg) if piece.layer is not None and piece.name.endswith(".weight")]
    matrices = [piece for piece in matrices if "norm" not in piece.role]
    packed: dict[str, set[bool]] = defaultdict(set)
    for piece in matrices:
        packed[piece.name].add(folder.is_packed(their_module(piece)))
    if mixed := next((name for name, found in packed.items() if len(found) > 1), None):
        raise UserError(f"{folder.path}: of the matrices that are one here, {mixed}, some are packed and some are not")
    chosen = [name.removesuffix(".weight") for name, found in packed.items() if found == {True}]
    if not chosen:
        return cfg
    layers = ("all",) if len(chosen) == len(packed) else tuple(chosen)
    return dataclasses.replace(cfg, quantize_weights="ternary", bitnet_layers=layers)


def _read(folder: _Folder, piece: Piece) -> Tensor:
    """A piece in fp32."""
    module, kind = their_module(piece), piece.name.rpartition(".")[2]
    value = folder.tensor(f"{module}.{kind}")
    if kind == "bias" or not folder.is_packed(module):
        return value.float()
    if value.dtype != torch.uint8:
        raise UserError(f"{folder.path}: {module} has a weight_scale, but no packed weights")
    codes, scale = unpack_rows(value).float(), folder.tensor(f"{module}.weight_scale").float()
    how = (folder.config.get("quantization_config") or {}).get("linear_class", "bitlinear")
    step = scale if how == "autobitlinear" else scale.reciprocal()
    density = codes.abs().mean(dtype=torch.float64).clamp_min(1e-300)
    return codes * (step.double() / density).float()
