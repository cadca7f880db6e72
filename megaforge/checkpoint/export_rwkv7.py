"""RWKV-7 models as RWKV-LM's ``.pth`` files (x070)."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from megaforge.checkpoint.architectures.base import Part, choose
from megaforge.checkpoint.architectures.rwkv7 import RWKV7_FILE
from megaforge.checkpoint.export_hf import DTYPES
from megaforge.checkpoint.import_rwkv7 import UNUSED
from megaforge.checkpoint.packed_file import open_quantized
from megaforge.checkpoint.sources import TensorSource
from megaforge.durable import replacing
from megaforge.errors import UserError

_WANTED = "--to rwkv7"


def export_rwkv7(source: TensorSource, file: str | Path, *, dtype: str | None = None) -> int:
    """Writes the model of the checkpoint ``source`` with RWKV-LM's names and shapes; memory holds one tensor at a time.

    Args:
        dtype: one of :data:`DTYPES`, of all tensors; None: what the run computed in.

    Returns:
        Bytes of the file.

    Raises:
        UserError: the model is not one of RWKV-LM's, or ``file`` exists or cannot be written.
    """
    model, file = open_quantized(source), Path(file)
    cfg, whose = model.config.model, f"the model of {source.path}"
    if model.schemes:
        raise UserError(f"{_WANTED}: {whose} has quantized matrices, which RWKV-LM's files have not; use --to packed")
    _ = choose(cfg, whose, _WANTED, [RWKV7_FILE])
    if file.exists():
        raise UserError(f"--save {file}: it exists; remove it, or name another file")
    kept = model.dtype if dtype is None else DTYPES[dtype]
    parts = {part.theirs: part for part in RWKV7_FILE.parts(cfg, model.specs)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            mapped = _empty_file(temporary, {name: part.shape for name, part in _with_unused(parts).items()}, kept)
            for name, tensor in mapped.items():
                if name in parts:
                    tensor.copy_(parts[name].to_theirs(model.read(parts[name].ours, parts[name].box)))
            del mapped
            size = temporary.stat().st_size
    except OSError as error:
        raise UserError(f"--save {file}: it was not written ({error.strerror})") from error
    return size


def _with_unused(parts: dict[str, Part]) -> dict[str, Part]:
    """In the order of layers, with what RWKV-LM's layer 0 has and nothing reads; it stays zero."""
    whole: dict[str, Part] = {}
    for name, part in parts.items():
        whole[name] = part
        if name == "blocks.0.att.a0":
            like = "blocks.1.att.v" if "blocks.1.att.v0" in parts else "blocks.0.att.a"
            whole |= {unused: parts[f"{like}{unused[-1]}"] for unused in UNUSED}
    return whole


def _empty_file(file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """A ``.pth`` file of zeros, and its tensors as parts of the mapped file: what is written to them is written to it.
    Without checksums, which would be of the zeros."""
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with torch.serialization.skip_data():
            torch.save({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, file)
    finally:
        torch.serialization.set_crc32_options(checked)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        tensors: dict[str, Tensor] = torch.load(file, mmap=True, weights_only=True)
    return tensors
