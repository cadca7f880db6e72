"""Attention models as Hugging Face's transformers reads them: BitNet, and Llama and Arcee with its BitNet quantizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaforge.checkpoint.attention_models import Piece, architecture, pieces
from megaforge.checkpoint.packed_file import QuantizedModel, open_quantized
from megaforge.checkpoint.safetensors_file import FileRecord, Slot, file_order, write_safetensors
from megaforge.checkpoint.sources import TensorSource
from megaforge.errors import UserError
from megaforge.quant.formats.hf_bitnet import pack_rows

_CLASSES = {"bitnet": "BitNetForCausalLM", "llama": "LlamaForCausalLM", "arcee": "ArceeForCausalLM"}
_ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    **{role: f"self_attn.{role}_proj" for role in "qkvo"},
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}
_MATRICES = frozenset(("q", "k", "v", "o", "gate", "up", "down"))
_WANTED = "--to hf"


def their_module(piece: Piece) -> str:
    """What transformers calls the module that ``piece`` belongs to."""
    if piece.layer is None:
        return _ENDS[piece.role]
    return f"model.layers.{piece.layer}.{_IN_LAYER[piece.role]}"


def export_hf(source: TensorSource, directory: str | Path) -> FileRecord:
    """Writes the model of the checkpoint ``source`` as ``config.json``, ``model.safetensors`` and, where it is a
    tokenizer.json, its tokenizer.

    Quantized matrices are packed, four rows in one, with the reciprocals of their steps (``bitlinear``). In fp32
    transformers computes what the model does; in bf16 it rounds the products of codes, which here are exact.

    Raises:
        UserError: transformers has no such model, or ``directory`` is not empty or cannot be written.
    """
    model, folder = open_quantized(source), Path(directory)
    kind = architecture(model, _WANTED)
    _check_quantizer(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--save {folder}: it exists and is not an empty directory; name another one")
    tensors = dict(_tensors(model))
    slots = sorted((Slot(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()), key=file_order)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(_config(model, kind), indent=2) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")
        record = write_safetensors(
            folder / "model.safetensors", slots, (tensors[slot.name] for slot in slots), {"format": "pt"}
        )
        _copy_tokenizer(model, folder)
    except OSError as error:
        raise UserError(f"--save {folder}: it was not written ({error.strerror})") from error
    return record


def _check_quantizer(model: QuantizedModel) -> None:
    cfg = model.config.model
    if not model.schemes:
        return
    if cfg.quant_granularity != "tensor":
        raise UserError(
            f"{_WANTED}: --quant-granularity {cfg.quant_granularity}: transformers' BitNet has one scale a matrix; use "
            "--to packed"
        )
    if cfg.activation_kind != "int8" or cfg.asymmetric_activations:
        raise UserError(
            f"{_WANTED}: transformers' BitNet quantizes activations to symmetric int8, and this model was trained with "
            f"--quantize-activations {cfg.activation_kind or 'none'}"
            f"{' --asymmetric-activations' if cfg.asymmetric_activations else ''}; use --to packed"
        )


def _tensors(model: QuantizedModel) -> Iterator[tuple[str, Tensor]]:
    for piece in pieces(model.config.model, model.specs):
        module = their_module(piece)
        if piece.name not in model.schemes:
            yield f"{module}.{piece.name.rpartition('.')[2]}", piece.of(model.read(piece.name)).contiguous()
            continue
        matrix = model.coded(piece.name)
        try:
            yield f"{module}.weight", pack_rows(piece.of(matrix.codes))
        except ValueError as error:
            raise UserError(f"{_WANTED}: {piece.name}, {piece.role}: {error}; use --to packed") from error
        step = matrix.step[piece.part].clamp_min(torch.finfo(torch.float32).tiny)  # of a matrix of zeros
        yield f"{module}.weight_scale", step.reciprocal().to(model.dtype).view(1)


def _config(model: QuantizedModel, kind: str) -> dict[str, Any]:
    cfg, config = model.config.model, model.config
    eod = (model.source.meta.get("tokenizer") or {}).get("eod")
    written: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": cfg.vocab_size or cfg.padded_vocab_size(),
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.ffn_size,
        "num_hidden_layers": len({piece.layer for piece in pieces(model.config.model, model.specs)} - {None}),
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.query_groups,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu" if cfg.activation == "swiglu" else "relu2",
        "max_position_embeddings": cfg.max_position_embeddings or config.data.seq_length,
        "rms_norm_eps": cfg.norm_epsilon,
        "rope_theta": cfg.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rotary_base},
        "tie_word_embeddings": not cfg.untie_embeddings_and_output_weights,
        "attention_bias": cfg.add_bias_linear,
        "mlp_bias": cfg.add_bias_linear,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    if model.schemes:
        left = [
            their_module(piece)
            for piece in pieces(model.config.model, model.specs)
            if piece.role in _MATRICES and piece.name not in model.schemes and not piece.is_bias
        ]
        written["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head", *left],
        }
    return written


def _copy_tokenizer(model: QuantizedModel, folder: Path) -> None:
    saved = model.source.meta.get("tokenizer") or {}
    path = Path(str(saved.get("model", "")))
    path = path / "tokenizer.json" if path.is_dir() else path
    if saved.get("type") == "HuggingFaceTokenizer" and path.suffix == ".json" and path.is_file():
        shutil.copyfile(path, folder / "tokenizer.json")
        named = {"eos_token": saved["eod_token"]} if saved.get("eod_token") else {}
        about = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
