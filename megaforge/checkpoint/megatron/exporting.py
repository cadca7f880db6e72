"""Our models as Megatron-LM's checkpoints, in the format of ``--ckpt-format torch_dist``."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megaforge.checkpoint.export_hf import DTYPES, SHARD_BYTES, write_tokenizer
from megaforge.checkpoint.hf_folder import publish_directory
from megaforge.checkpoint.megatron.arguments import args_of
from megaforge.checkpoint.megatron.files import LATEST, listed
from megaforge.checkpoint.megatron.names import MegatronPart, parts, unknown
from megaforge.checkpoint.megatron.torch_dist import COMMON, METADATA
from megaforge.checkpoint.packed_file import QuantizedModel, open_quantized
from megaforge.checkpoint.sources import TensorSource
from megaforge.errors import UserError

_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
# Transformer Engine's modules keep a state of their own, which is empty but for fp8.
_WITH_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "layernorm", "output_layer", "core_attention")


class Exported(NamedTuple):
    """What was written: bytes of all files, and files of the tokenizer."""

    bytes: int
    tokenizer: list[str]


class _Place(NamedTuple):
    """Where a tensor goes: a key, and its place along the dimensions that the key's tensor has before its own."""

    key: str
    at: tuple[int, ...]
    sizes: tuple[int, ...]


def export_megatron(source: TensorSource, directory: str | Path, *, dtype: str | None = None) -> Exported:
    """Writes the model of the checkpoint ``source`` as Megatron-LM keeps it, for any of its layouts. Memory holds one
    tensor, or an expert of it, at a time.

    Args:
        dtype: one of :data:`megaforge.checkpoint.export_hf.DTYPES`; None: what the run computed in.

    Raises:
        UserError: Megatron's GPT does not compute what the model does, or ``directory`` is not empty or cannot be
            written.
    """
    model = open_quantized(source)
    args = args_of(model.config)
    if names := unknown(model.specs):
        raise UserError(f"--to megatron: Megatron's GPT has no {listed(names)}")
    if dtype is not None:
        model = model._replace(dtype=DTYPES[dtype])
    return publish_directory(directory, lambda folder: _write(model, args, folder))


def _write(model: QuantizedModel, args: dict[str, Any], folder: Path) -> Exported:
    step = model.source.step
    name = f"iter_{step:07d}" if step else "release"  # Megatron-LM takes no iteration 0
    path = folder / name
    path.mkdir()
    size = _Writer(model, path).write()
    about = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    about |= {"common_backend": "torch", "common_backend_version": 1}
    (path / "metadata.json").write_text(json.dumps(about), encoding="utf-8")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    files = write_tokenizer(model, tokenizer)
    if not files:
        tokenizer.rmdir()
    saved = argparse.Namespace(**args, iteration=step, params_dtype=model.dtype, ckpt_format="torch_dist")
    torch.save({"args": saved, "iteration": step, "checkpoint_version": 3.0}, path / COMMON)
    (folder / LATEST).write_text(str(step) if step else name, encoding="utf-8")
    return Exported(size, files)


class _Writer:
    """The files of one iteration."""

    def __init__(self, model: QuantizedModel, path: Path) -> None:
        cfg = model.config.model
        self.model, self.path = model, path
        self.parts = list(parts(cfg, model.specs))
        layers = {part.layer for part in self.parts if part.layer is not None}
        kinds = {frozenset(_inside(part) for part in self.parts if part.layer == layer) for layer in layers}
        # Layers of one kind are stacked; Megatron-LM numbers others.
        self.layers = len(layers) if len(kinds) == 1 else None
        self.experts = cfg.num_experts
        self.metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.storage: dict[MetadataIndex, _StorageInfo] = {}
        self.files = self.written = 0

    def write(self) -> int:
        """Bytes of all tensors."""
        waiting = list(self.parts)
        while waiting:
            with open(self.path / f"__0_{self.files}.distcp", "xb") as file:
                if not self.files:
                    self._write_states(file)
                while waiting and file.tell() < SHARD_BYTES:
                    self._write_part(file, waiting.pop(0))
                self.written += file.tell()
            self.files += 1
        with open(self.path / METADATA, "xb") as file:
            pickle.dump(Metadata(self.metadata, None, self.storage, StorageMeta(), "1.0.0"), file)
        return self.written

    def _write_part(self, file: BinaryIO, part: MegatronPart) -> None:
        value = part.to_theirs(self.model.read(part.ours, part.box)).detach()
        where: _StorageInfo | None = None
        for key, index, leading in self._places(part.theirs):
            sizes = (*(1 for _ in index), *value.shape)
            where = self._put(file, value.view(sizes).clone()) if where is None else where
            offsets = (*index, *(0 for _ in value.shape))
            whole = torch.Size((*leading, *value.shape))
            known = self.metadata.setdefault(key, TensorStorageMetadata(TensorProperties(value.dtype), whole, []))
            assert isinstance(known, TensorStorageMetadata)
            self.storage[MetadataIndex(key, offsets, len(known.chunks))] = where
            known.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))

    def _write_states(self, file: BinaryIO) -> None:
        """An empty state of each module that may have one."""
        where = self._put(file, [None])
        modules = {part.theirs.rpartition(".")[0] for part in self.parts}
        modules |= {re.sub(r"linear_qkv$", "core_attention", name) for name in modules}
        for module in sorted(name for name in modules if name.endswith(_WITH_STATE)):
            for key, index, sizes in self._places(f"{module}._extra_state"):
                places = ".".join(map(str, index or (0,))), ".".join(map(str, sizes or (1,)))
                key = f"{key}/shard_{places[0]}_{places[1]}"
                self.metadata[key], self.storage[MetadataIndex(key)] = BytesStorageMetadata(), where

    def _put(self, file: BinaryIO, value: Tensor | list[None]) -> _StorageInfo:
        start, buffer = file.tell(), io.BytesIO()
        torch.save(value, buffer)
        file.write(buffer.getbuffer())
        return _StorageInfo(f"__0_{self.files}.distcp", start, file.tell() - start)

    def _places(self, name: str) -> Iterator[_Place]:
        """The keys under which Megatron-LM looks for a tensor: a norm's depend on its kind of layers."""
        index, sizes = list[int](), list[int]()
        if self.layers is not None and (found := re.match(r"decoder\.layers\.(\d+)\.", name)):
            name = name.replace(found[0], "decoder.layers.", 1)
            index, sizes = [int(found[1])], [self.layers]
        if found := re.search(r"\.mlp\.experts\.(\d+)\.", name):
            name = name.replace(found[0], ".mlp.experts.experts.", 1)
            index, sizes = [*index, int(found[1])], [*sizes, self.experts]
        yield _Place(name, tuple(index), tuple(sizes))
        for norm, fused in _NORMS.items():
            if norm in name:
                yield _Place(name.replace(norm, fused), tuple(index), tuple(sizes))


def _inside(part: MegatronPart) -> str:
    """A tensor's name in its layer."""
    return part.theirs.split(".", 3)[3]
