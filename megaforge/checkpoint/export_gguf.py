"""Attention models as GGUF files, whose quantized matrices are blocks of ggml's 1- and 2-bit types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaforge.checkpoint.attention_models import Piece, pieces
from megaforge.checkpoint.gguf_file import PLAIN, GGUFTensor, write_gguf
from megaforge.checkpoint.packed_file import QuantizedModel, open_quantized
from megaforge.checkpoint.published import architecture
from megaforge.checkpoint.sources import TensorSource
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.quant.formats.ggml_blocks import BLOCK_TYPES, BlockType

_ENDS = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
_IN_LAYER = {
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention_sub_norm": "attn_sub_norm",
    "ffn_sub_norm": "ffn_sub_norm",
    **{role: f"attn_{role}" for role in "qkv"},
    "o": "attn_output",
    **{role: f"ffn_{role}" for role in ("gate", "up", "down")},
}
_WANTED = "--to gguf"
_NORMAL, _CONTROL = 1, 3  # llama.cpp's types of tokens


def export_gguf(source: TensorSource, file: str | Path, block_type: str | None = None) -> tuple[int, bool]:
    """Writes the model of the checkpoint ``source``.

    Matrices that are not quantized, norms and biases keep their type; steps are stored as fp16 (train with
    ``--quant-scale-dtype fp16`` to have the same in training).

    Args:
        block_type: one of :data:`BLOCK_TYPES`; None: TQ2_0 for ternary weights, Q1_0 for binary ones.

    Returns:
        The file's bytes, and whether it has the tokenizer, which llama.cpp needs to run it.

    Raises:
        UserError: llama.cpp has no such model, the blocks do not fit, or ``file`` exists or cannot be written.
    """
    model, file = open_quantized(source), Path(file)
    kind = architecture(model, _WANTED, ("llama", "arcee", "bitnet")).name
    blocks = _blocks(model, block_type)
    if kind == "bitnet" and model.config.model.activation != "swiglu":
        raise UserError(
            f"{_WANTED}: llama.cpp's bitnet has gates of SiLU; train with --activation swiglu, or use --to hf"
        )
    if kind == "bitnet" and model.config.model.untie_embeddings_and_output_weights:
        raise UserError(f"{_WANTED}: llama.cpp's bitnet has its embedding as its head, and this model is untied")
    if model.config.model.use_rope_scaling or model.config.model.rotary_seq_len_interpolation_factor:
        raise UserError(f"{_WANTED}: rotary positions that are scaled are not written to GGUF; use --to hf")
    if file.exists():
        raise UserError(f"--save {file}: it exists; remove it, or name another file")
    tokenizer = _tokenizer(model)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            size = write_gguf(temporary, _fields(model, kind, blocks) | tokenizer, list(_tensors(model, kind, blocks)))
    except OSError as error:
        raise UserError(f"--save {file}: it was not written ({error.strerror})") from error
    return size, bool(tokenizer)


def _blocks(model: QuantizedModel, name: str | None) -> BlockType | None:
    if not model.schemes:
        if name is not None:
            raise UserError(f"--gguf-type {name}: no matrix of {model.source.path} is quantized; leave it out")
        return None
    cfg = model.config.model
    if cfg.quant_granularity == "group":
        raise UserError(f"{_WANTED}: --quant-granularity group: blocks here have scales of tensors or rows")
    if name == "Q1_0" and cfg.quantize_weights == "ternary":
        raise UserError("--gguf-type Q1_0: it has one bit a weight, and these are ternary; use TQ1_0, TQ2_0 or Q2_0")
    chosen = BLOCK_TYPES[name or ("Q1_0" if cfg.quantize_weights == "binary" else "TQ2_0")]
    for parameter in model.schemes:
        columns = model.specs[parameter].shape[-1]
        if columns % chosen.weights:
            fitting = [kind.name for kind in BLOCK_TYPES.values() if columns % kind.weights == 0]
            fitting = [one for one in fitting if one != "Q1_0" or cfg.quantize_weights == "binary"]
            advice = (
                f"use --gguf-type {' or '.join(fitting)}" if fitting else "widths that are multiples of 64 fit Q2_0"
            )
            raise UserError(
                f"{_WANTED}: {chosen.name} has blocks of {chosen.weights} weights, and rows of {parameter} have "
                f"{columns}; {advice}"
            )
    return chosen


def _tensors(model: QuantizedModel, kind: str, blocks: BlockType | None) -> Iterator[GGUFTensor]:
    for piece in pieces(model.config.model, model.specs):
        name = gguf_name(piece)
        if piece.name not in model.schemes or blocks is None:
            value = _ordered(model, kind, piece, piece.of(model.read(piece.name)))
            value = value.float() if value.dim() == 1 or value.dtype not in PLAIN else value
            yield GGUFTensor(name, tuple(value.shape), PLAIN[value.dtype], value)
            continue
        matrix = model.coded(piece.name)
        codes = _ordered(model, kind, piece, piece.of(matrix.codes))
        by_rows = model.schemes[piece.name].granularity == "channel"
        step = _ordered(model, kind, piece, piece.of(matrix.step)).unsqueeze(1) if by_rows else matrix.step[piece.part]
        try:
            data = blocks.encode(codes, step)
        except ValueError as error:
            raise UserError(f"{_WANTED}: {piece.name}, {piece.role}: {error}") from error
        yield GGUFTensor(name, tuple(codes.shape), blocks.number, data)


def gguf_name(piece: Piece) -> str:
    """What llama.cpp calls it."""
    module = _ENDS[piece.role] if piece.layer is None else f"blk.{piece.layer}.{_IN_LAYER[piece.role]}"
    return f"{module}.{piece.name.rpartition('.')[2]}"


def _ordered(model: QuantizedModel, kind: str, piece: Piece, rows: Tensor) -> Tensor:
    """Rows of queries and keys as the architecture's rotary positions pair them: of ``bitnet`` channel i with i + d/2,
    as here; of the others neighbours."""
    if kind == "bitnet" or piece.role not in ("q", "k"):
        return rows
    half = model.config.model.head_dim // 2
    return rows.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2).contiguous()


def _fields(model: QuantizedModel, kind: str, blocks: BlockType | None) -> dict[str, Any]:
    cfg, data = model.config.model, model.config.data
    plain = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
    fields: dict[str, Any] = {
        "general.architecture": kind,
        "general.name": model.config.name,
        "general.quantization_version": 2,
        "general.file_type": plain.get(model.dtype, 0) if blocks is None else blocks.file_type,
    }
    own = {
        "block_count": len({piece.layer for piece in pieces(model.config.model, model.specs)} - {None}),
        "context_length": cfg.max_position_embeddings or data.seq_length,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.ffn_size,
        "attention.head_count": cfg.num_attention_heads,
        "attention.head_count_kv": cfg.query_groups,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.norm_epsilon,
        "rope.dimension_count": cfg.head_dim,
        "rope.freq_base": cfg.rotary_base,
        "vocab_size": cfg.vocab_size or cfg.padded_vocab_size(),
    }
    return fields | {f"{kind}.{key}": value for key, value in own.items()}


def _tokenizer(model: QuantizedModel) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json as llama.cpp has such; nothing of others."""
    saved = model.source.meta.get("tokenizer") or {}
    path = Path(str(saved.get("model", "")))
    path = path / "tokenizer.json" if path.is_dir() else path
    if saved.get("type") != "HuggingFaceTokenizer" or path.suffix != ".json" or not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
        bpe, added = content["model"], content.get("added_tokens", [])
        if bpe["type"] != "BPE" or "ByteLevel" not in str(content.get("decoder")):
            return {}
        tokens = {int(number): text for text, number in bpe["vocab"].items()}
        special = {int(one["id"]): one["content"] for one in added}
        merges = [one if isinstance(one, str) else " ".join(one) for one in bpe["merges"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    tokens |= special
    count = model.config.model.vocab_size or len(tokens)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [tokens.get(i, f"[unused{i}]") for i in range(count)],
        "tokenizer.ggml.token_type": [_CONTROL if i in special or i not in tokens else _NORMAL for i in range(count)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    if saved.get("eod") is not None:
        fields |= {"tokenizer.ggml.eos_token_id": int(saved["eod"]), "tokenizer.ggml.bos_token_id": int(saved["eod"])}
    return fields
