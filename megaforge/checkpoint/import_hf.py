"""Models in Hugging Face's form as checkpoints of ours: those of :data:`megaforge.registry.ARCHITECTURES`, some with
matrices in BitNet's packed form."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from megaforge.checkpoint.architectures.base import Architecture, Given, Part
from megaforge.checkpoint.hf_folder import HFFolder
from megaforge.checkpoint.part_source import PartSource, check_parts
from megaforge.checkpoint.published_import import Import, describe_import, write_import
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.parameter_count import declared_parameters
from megaforge.quant.formats.hf_bitnet import unpack_rows
from megaforge.registry import ARCHITECTURES

SCALE = "_scale"  # a packed matrix NAME has a tensor NAME_scale


def config_of(folder: str | Path) -> ModelConfig:
    """The model that a directory's ``config.json`` describes, but for which of its matrices are quantized.

    Raises:
        UserError: it is of an architecture that we do not have.
    """
    return _described(HFFolder(folder))[1]


def _described(folder: HFFolder) -> tuple[Architecture, ModelConfig]:
    kind = str(folder.config.get("model_type"))
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES.names())
        raise UserError(f"{folder.path}: model_type {kind} is not one of {known}")
    architecture: Architecture = ARCHITECTURES.get(kind)
    return architecture, architecture.model(Given(folder.path, folder.config, architecture.defaults))


def import_hf(wanted: Import) -> Path:
    """Writes the weights of the directory ``wanted.path`` as a checkpoint.

    A packed matrix has the codes c and one scale s. Its weights here are c s / mean|c|, whose ternary codes are c and
    whose mean magnitude is s: the model that is trained on is the one that was published.

    Raises:
        UserError: naming the directory and what is wrong with it.
    """
    folder = HFFolder(wanted.path)
    architecture, cfg = _described(folder)
    parts = list(architecture.parts(cfg, declared_parameters(cfg)))
    prefix = architecture.optional_prefix
    if prefix and not any(name.startswith(prefix) for name in folder.slots):
        parts = [dataclasses.replace(part, theirs=part.theirs.removeprefix(prefix)) for part in parts]
    cfg = _quantized(cfg, folder, parts)
    unread = architecture.unread
    if not cfg.untie_embeddings_and_output_weights:
        unread = (*unread, "lm_head.weight")
    check_parts(parts, _shapes(folder, parts), str(folder.path), (*unread, SCALE))
    source = {"format": "hf", "model_type": architecture.name, "directory": folder.path.name}
    meta = describe_import(wanted, cfg, source)
    read = functools.partial(_read, folder)
    return write_import(wanted, cfg, PartSource(folder.path, meta, declared_parameters(cfg), parts, read))


def _is_packed(folder: HFFolder, part: Part) -> bool:
    return f"{part.theirs}{SCALE}" in folder


def _shapes(folder: HFFolder, parts: list[Part]) -> dict[str, tuple[int, ...]]:
    """Of the tensors, packed ones as they are unpacked."""
    shapes = {name: slot.shape for name, slot in folder.slots.items()}
    for part in parts:
        if part.theirs in shapes and _is_packed(folder, part):
            if folder.slots[part.theirs].dtype != torch.uint8:
                raise UserError(f"{folder.path}: {part.theirs} has a scale, but no packed weights")
            rows, *columns = shapes[part.theirs]
            shapes[part.theirs] = (4 * rows, *columns)
    return shapes


def _quantized(cfg: ModelConfig, folder: HFFolder, parts: list[Part]) -> ModelConfig:
    """``cfg`` with those matrices ternary that are packed in the folder."""
    method = (folder.config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "bitnet"):
        raise UserError(f"{folder.path}: quant_method {method}: only bitnet and no quantization are known")
    packed: dict[str, set[bool]] = defaultdict(set)
    for part in parts:
        if part.layer is not None and len(part.shape) == 2:
            packed[part.ours].add(_is_packed(folder, part))
    if mixed := next((name for name, found in packed.items() if len(found) > 1), None):
        raise UserError(f"{folder.path}: of the matrices that are one here, {mixed}, some are packed and some are not")
    chosen = [name.removesuffix(".weight") for name, found in packed.items() if found == {True}]
    if not chosen:
        return cfg
    layers = ("all",) if len(chosen) == len(packed) else tuple(chosen)
    return dataclasses.replace(cfg, quantize_weights="ternary", bitnet_layers=layers)


def _read(folder: HFFolder, part: Part) -> Tensor:
    value = folder.tensor(part.theirs)
    if not _is_packed(folder, part):
        return value
    codes, scale = unpack_rows(value).float(), folder.tensor(f"{part.theirs}{SCALE}").float()
    how = (folder.config.get("quantization_config") or {}).get("linear_class", "bitlinear")
    step = scale if how == "autobitlinear" else scale.reciprocal()
    density = codes.abs().mean(dtype=torch.float64).clamp_min(1e-300)
    return codes * (step.double() / density).float()
