"""Attention models in GGUF files as checkpoints of ours: Llama's, Arcee's and BitNet's, with plain, ternary or binary
matrices. A file's blocks of one and two bits become weights with those very codes and steps."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.checkpoint.architectures.base import Architecture, Given, Part
from megaforge.checkpoint.attention_models import Piece, pieces
from megaforge.checkpoint.export_gguf import gguf_name
from megaforge.checkpoint.gguf_file import PLAIN, GGUFFile
from megaforge.checkpoint.part_source import PartSource, check_parts
from megaforge.checkpoint.published_import import Import, describe_import, write_import
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.parameter_count import declared_parameters
from megaforge.quant.formats.ggml_blocks import BLOCK_TYPES
from megaforge.registry import ARCHITECTURES

_ACTIVATIONS = {"llama": "silu", "bitnet": "silu", "arcee": "relu2"}  # of the architectures that are read
_FIELDS = {  # theirs -> ours, as config.json names it
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_PLAIN = {number: dtype for dtype, number in PLAIN.items()}
_BLOCKS = {kind.number: kind for kind in BLOCK_TYPES.values()}


class Matrix(NamedTuple):
    """Codes int8 [N, K], and steps [N, blocks of a row], fp32."""

    codes: Tensor
    steps: Tensor

    @property
    def granularity(self) -> str:
        """What shares a step."""
        if bool((self.steps == self.steps[:1, :1]).all()):
            return "tensor"
        return "channel" if bool((self.steps == self.steps[:, :1]).all()) else "group"

    def weights(self, granularity: str, binary: bool) -> Tensor:
        """fp32 weights whose codes and steps by our quantizers are these."""
        codes, blocks = self.codes.float(), self.steps.shape[1]
        shape = {
            "tensor": (1, -1),
            "channel": (len(codes), -1),
            "group": (codes.numel() // codes.shape[1] * blocks, -1),
        }
        if binary:
            return (codes.unflatten(1, (blocks, -1)) * self.steps.unsqueeze(-1)).flatten(1)
        units = codes.reshape(shape[granularity])
        density = units.abs().mean(1, keepdim=True, dtype=torch.float64).clamp_min(1e-300)
        step = self.steps.reshape(len(units), -1)[:, :1].double()
        return (units * (step / density).float()).reshape(codes.shape)


def import_gguf(wanted: Import) -> Path:
    """Writes the weights of the file ``wanted.path`` as a checkpoint. Its tokenizer is not read.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    file = GGUFFile(wanted.path)
    architecture, cfg = _described(file)
    found = list(pieces(cfg, declared_parameters(cfg)))
    cfg = _quantized(cfg, file, found)
    specs = declared_parameters(cfg)
    roles = {gguf_name(piece): piece for piece in found}
    parts = [_part(piece, specs[piece.name].shape) for piece in found]
    check_parts(parts, {name: slot.shape for name, slot in file.slots.items()}, str(file.path))
    meta = describe_import(wanted, cfg, {"format": "gguf", "model_type": architecture.name, "file": file.path.name})
    read = partial(_read, file, architecture.name, cfg, roles)
    return write_import(wanted, cfg, PartSource(file.path, meta, specs, parts, read))


def _described(file: GGUFFile) -> tuple[Architecture, ModelConfig]:
    kind = str(file.fields.get("general.architecture"))
    if kind not in _ACTIVATIONS:
        raise UserError(f"{file.path}: general.architecture {kind} is not one of {', '.join(_ACTIVATIONS)}")

    def field(name: str, default: Any = None) -> Any:
        return file.fields.get(f"{kind}.{name}", default)

    if lacking := next((name for name in _FIELDS if type(field(name)) not in (int, float)), None):
        raise UserError(f"{file.path}: {kind}.{lacking} is missing, or no number")
    if "rope_freqs.weight" in file.slots or field("rope.scaling.type", "none") != "none":
        raise UserError(f"{file.path}: its rotary positions are scaled, which is not read from GGUF; use --from hf")
    if "token_embd.weight" not in file.slots:
        raise UserError(f"{file.path}: the weight token_embd.weight is missing")
    biased = "blk.0.attn_q.bias" in file.slots
    values: dict[str, Any] = {
        **{ours: field(theirs) for theirs, ours in _FIELDS.items()},
        "num_key_value_heads": field("attention.head_count_kv", field("attention.head_count")),
        "head_dim": field("attention.key_length", field("embedding_length") // field("attention.head_count")),
        "rope_theta": float(field("rope.freq_base", 10000.0)),
        "max_position_embeddings": field("context_length", 2048),
        "vocab_size": file.slots["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.slots,
        "hidden_act": _ACTIVATIONS[kind],
        "attention_bias": biased,
        "mlp_bias": biased,
    }
    architecture: Architecture = ARCHITECTURES.get(kind)
    return architecture, architecture.model(Given(file.path, values, architecture.defaults))


def _part(piece: Piece, shape: tuple[int, ...]) -> Part:
    box = piece.box(shape)
    sizes = tuple(end - start for start, end in box)
    return Part(gguf_name(piece), piece.name, box, sizes, number=piece.part, layer=piece.layer)


def _quantized(cfg: ModelConfig, file: GGUFFile, found: list[Piece]) -> ModelConfig:
    """``cfg`` with those matrices quantized that are blocks of codes in the file, with steps as they are there."""
    kinds: dict[str, set[str]] = defaultdict(set)
    granularities, sizes = set[str](), set[int]()
    for piece in found:
        name = gguf_name(piece)
        if piece.layer is None or name not in file.slots or len(file.slots[name].shape) != 2:
            continue
        matrix = _matrix(file, name)
        kinds[piece.name].add("none" if matrix is None else _scheme(file, name, matrix))
        if matrix is not None:
            granularities.add(matrix.granularity)
            sizes.add(matrix.codes.shape[1] // matrix.steps.shape[1])
    if mixed := next((name for name, some in kinds.items() if len(some) > 1), None):
        raise UserError(f"{file.path}: of the matrices that are one here, {mixed}, the blocks are of several kinds")
    schemes = {kind for some in kinds.values() for kind in some} - {"none"}
    if not schemes:
        return cfg
    if len(schemes) > 1:
        raise UserError(f"{file.path}: some of its matrices are binary and some ternary; a model here has one kind")
    granularity = max(granularities, key=("tensor", "channel", "group").index)
    if granularity == "group" and len(sizes) > 1:
        raise UserError(f"{file.path}: its blocks have steps for {min(sizes)} and {max(sizes)} weights")
    chosen = [name.removesuffix(".weight") for name, some in kinds.items() if some != {"none"}]
    return dataclasses.replace(
        cfg,
        quantize_weights=schemes.pop(),
        bitnet_layers=("all",) if len(chosen) == len(kinds) else tuple(chosen),
        quant_granularity=granularity,
        quant_scale_dtype="fp16",
        quant_group_size=sizes.pop() if granularity == "group" else cfg.quant_group_size,
    )


def _scheme(file: GGUFFile, name: str, matrix: Matrix) -> str:
    """binary or ternary."""
    if bool((matrix.codes > 1).any()):
        raise UserError(f"{file.path}: {name} has codes beyond -1, 0 and 1")
    if _BLOCKS[file.slots[name].kind].name != "Q1_0":
        return "ternary"
    if bool((matrix.codes < 0).all(1).any()):
        raise UserError(f"{file.path}: {name} has a row of -1 alone, which binary weights by their mean have not")
    return "binary"


def _matrix(file: GGUFFile, name: str) -> Matrix | None:
    """Of blocks; None of a plain tensor."""
    shape, number, _ = file.slots[name]
    if number in _PLAIN:
        return None
    kind = _BLOCKS.get(number)
    if kind is None or shape[-1] % kind.weights:
        known = ", ".join(("F32, F16, BF16", *BLOCK_TYPES))
        raise UserError(f"{file.path}: {name} {list(shape)} is of ggml's type {number}; read are {known}")
    rows, width = math.prod(shape[:-1]), kind.row_bytes(shape[-1])
    return Matrix(*kind.decode(file.content(name, rows * width).view(rows, width)))


def _read(file: GGUFFile, kind: str, cfg: ModelConfig, roles: dict[str, Piece], part: Part) -> Tensor:
    matrix, slot = _matrix(file, part.theirs), file.slots[part.theirs]
    if matrix is not None and part.layer is None:  # an embedding or a head: nothing quantizes it here
        steps = matrix.steps.repeat_interleave(matrix.codes.shape[1] // matrix.steps.shape[1], 1)
        value = matrix.codes.float() * steps
    elif matrix is not None:
        value = matrix.weights(cfg.quant_granularity, cfg.quantize_weights == "binary")
    else:
        dtype = _PLAIN[slot.kind]
        value = file.content(part.theirs, math.prod(slot.shape) * dtype.itemsize).view(dtype).view(slot.shape)
    if kind == "bitnet" or roles[part.theirs].role not in ("q", "k"):
        return value
    half = cfg.head_dim // 2  # their rotary positions pair neighbours, ours channel i with i + d/2
    return value.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2).contiguous()
