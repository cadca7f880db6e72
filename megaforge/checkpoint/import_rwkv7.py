"""Published RWKV-7 weights (BlinkDL's ``.pth`` files of x070 models) as a checkpoint of ours, value for value."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megaforge.checkpoint.architectures.base import Part
from megaforge.checkpoint.architectures.rwkv7 import pth_parts, rwkv7_config
from megaforge.checkpoint.part_source import PartSource, check_parts
from megaforge.checkpoint.published_import import Import, describe_import, write_import
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.parameter_count import declared_parameters

# RWKV-LM's layer 0 has them, and neither trains nor reads them: it makes the values that others mix in.
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
_X070 = "blocks.0.att.r_k"


def config_of(weights: Mapping[str, Tensor], where: str) -> ModelConfig:
    """The model that these RWKV-LM ``weights`` are of, told from their names and shapes.

    Raises:
        UserError: they are not RWKV-7's; ``where`` is what the message calls them.
    """
    low_rank = (f"blocks.0.att.{letter}1" for letter in "wag")
    needed = ("emb.weight", "blocks.0.ln0.weight", _X070, "blocks.0.ffn.key.weight", *low_rank)
    missing = [name for name in needed if name not in weights]
    if missing:
        raise UserError(f"{where}: these are not RWKV-7 (x070) weights: no tensor is called {', '.join(missing)}")
    vocab, hidden = weights["emb.weight"].shape
    heads, head_size = weights[_X070].shape
    value_lora = weights.get("blocks.1.att.v1")
    return rwkv7_config(
        layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        hidden_size=hidden,
        ffn_hidden_size=weights["blocks.0.ffn.key.weight"].shape[0],
        num_attention_heads=heads,
        vocab_size=vocab,
        rwkv_head_size=head_size,
        rwkv_decay_rank=weights["blocks.0.att.w1"].shape[1],
        rwkv_iclr_rank=weights["blocks.0.att.a1"].shape[1],
        rwkv_value_rank=None if value_lora is None else value_lora.shape[1],
        rwkv_gate_rank=weights["blocks.0.att.g1"].shape[1],
    )


def rwkv7_source(weights: Mapping[str, Tensor], path: Path) -> tuple[ModelConfig, PartSource]:
    """RWKV-LM's ``weights`` as ours: the model, and its tensors in fp32 (fp64 where they come as such), the vocabulary
    padded with zero rows.

    Raises:
        UserError: a tensor is missing, unknown, or of a shape that the others contradict.
    """
    cfg = config_of(weights, str(path))
    specs = declared_parameters(cfg)
    parts = list(pth_parts(cfg, specs))
    check_parts(parts, {name: tuple(value.shape) for name, value in weights.items()}, str(path), UNUSED)
    wide = any(value.dtype == torch.float64 for value in weights.values())

    def tensor(part: Part) -> Tensor:
        return weights[part.theirs]

    return cfg, PartSource(path, {}, specs, parts, tensor, torch.float64 if wide else torch.float32)


def read_pth(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file, mapped, and read without running any code from it.

    Raises:
        UserError: it is missing, damaged, or holds something else than named tensors.
    """
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file") from error
    except Exception as error:  # a damaged or foreign file makes torch raise almost anything
        code = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = f"it asks to run {code[1]}" if code else reason
        raise UserError(f"{file}: not a file of tensors that torch can read safely ({reason})") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file}: holds something else than named tensors; give the published .pth of the model")
    return weights


def import_rwkv7(wanted: Import) -> Path:
    """Writes the published weights ``wanted.path``, a ``.pth`` file, as a checkpoint.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    cfg, source = rwkv7_source(read_pth(wanted.path), wanted.path)
    with open(wanted.path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    source.meta = describe_import(wanted, cfg, {"format": "rwkv7", "file": wanted.path.name, "sha256": digest})
    return write_import(wanted, cfg, source)
