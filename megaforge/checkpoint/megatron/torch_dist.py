"""Megatron-LM's ``--ckpt-format torch_dist``: files of torch.distributed.checkpoint and ``common.pt``."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megaforge.checkpoint.boxes import box_of
from megaforge.checkpoint.megatron.files import MegatronFiles, Piece, Stored, arguments_of, listed, plain_name
from megaforge.checkpoint.megatron.pickles import Inert, read_pickle, read_torch, read_torch_at
from megaforge.checkpoint.sources import TensorInfo
from megaforge.errors import UserError

METADATA, COMMON = ".metadata", "common.pt"
# What a run keeps beside its model.
_OTHER = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state|opt_param_scheduler|.*_extra_state")


class _Entry(NamedTuple):
    file: str
    offset: int
    length: int


class _Chunk(NamedTuple):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    entry: _Entry


class _Key(NamedTuple):
    """A key of the files, taken apart: the model's name with ``{}`` for what leading dimensions count, their number,
    and which half of the rows it is (swiglu's ``_w`` and ``_v``)."""

    template: str
    leading: int
    half: int | None


class TorchDistFiles(MegatronFiles):
    """
    Raises:
        UserError: it is damaged or incomplete, holds code, or does not say which model it is of.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        common = read_torch(path / COMMON)
        if not isinstance(common, dict):
            raise UserError(f"{path / COMMON}: holds something else than Megatron-LM's state")
        self.iteration = int(common.get("iteration", 0))
        self.args = arguments_of(path / COMMON, common.get("args"))
        self._last: tuple[_Entry, Tensor] | None = None
        chunks = _read_metadata(path / METADATA)
        self._check_files({chunk.entry for _, found in chunks.values() for chunk in found})
        self.tensors = _tensors(chunks)
        self.check_whole()

    def _check_files(self, entries: set[_Entry]) -> None:
        needed: dict[str, int] = {}
        for entry in entries:
            needed[entry.file] = max(needed.get(entry.file, 0), entry.offset + entry.length)
        missing = sorted(name for name in needed if not (self.path / name).is_file())
        if missing:
            raise UserError(f"{self.path}: files are missing: {listed(missing)}")
        short = sorted(name for name, end in needed.items() if (self.path / name).stat().st_size < end)
        if short:
            raise UserError(f"{self.path}: files are shorter than {METADATA} says: {listed(short)}")

    def load(self, entry: _Entry) -> Tensor:
        if self._last is None or self._last[0] != entry:
            file = self.path / entry.file
            with open(file, "rb") as stream:
                stream.seek(entry.offset)
                value = read_torch_at(file, io.BytesIO(stream.read(entry.length)))
            if not isinstance(value, Tensor):
                raise UserError(f"{file}: the entry at byte {entry.offset} is not a tensor")
            self._last = entry, value
        return self._last[1]


def _read_metadata(file: Path) -> dict[str, tuple[TensorInfo, list[_Chunk]]]:
    """Type, shape and parts of each tensor of the model, by key."""
    metadata = read_pickle(file)
    try:
        entries = {}
        for index, info in metadata.get("storage_data").items():
            if info.get("transform_descriptors"):
                raise UserError(f"{file}: its tensors are transformed ({info.get('transform_descriptors')})")
            where = _Entry(str(info.get("relative_path")), int(info.get("offset")), int(info.get("length")))
            entries[str(index.get("fqn")), index.get("offset")] = where
        found = {}
        for key, of in metadata.get("state_dict_metadata").items():
            if not isinstance(of, Inert) or not of.name.endswith(".TensorStorageMetadata") or _OTHER.match(key):
                continue
            info = TensorInfo(of.get("properties").state[0], tuple(of.get("size")))
            chunks = [(tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))) for chunk in of.get("chunks")]
            found[str(key)] = info, [_Chunk(at, size, entries[key, at]) for at, size in chunks]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{file}: not the metadata of a checkpoint ({type(error).__name__}: {error})") from error
    if outside := sorted({entry.file for entry in entries.values() if Path(entry.file).name != entry.file}):
        raise UserError(f"{file}: it names files outside its directory: {listed(outside)}")
    return found


def _key(key: str) -> _Key:
    half = {"_w": 0, "_v": 1}.get(key[-2:]) if key.endswith(("weight_w", "weight_v", "bias_w", "bias_v")) else None
    name, leading = key if half is None else key[:-2], 0
    if re.match(r"decoder\.layers\.(?!\d)", name):
        name, leading = name.replace("decoder.layers.", "decoder.layers.{}.", 1), 1
    if re.search(r"\.mlp\.experts\.experts\.(?!\d)", name):
        name, leading = name.replace(".mlp.experts.experts.", ".mlp.experts.{}.", 1), leading + 1
    return _Key(name.replace(".mlp.experts.experts.", ".mlp.experts."), leading, half)


def _tensors(chunks: dict[str, tuple[TensorInfo, list[_Chunk]]]) -> dict[str, Stored]:
    """The model's tensors, one for each layer and expert."""
    tensors: dict[str, Stored] = {}
    for key, (info, found) in chunks.items():
        template, leading, half = _key(key)
        shape = info.shape[leading:]
        pieces: dict[tuple[int, ...], list[Piece]] = {}
        first = 0 if not half else shape[0]
        for offsets, sizes, entry in found:
            box = box_of(offsets[leading:], sizes[leading:])
            if half is not None:
                box = ((box[0][0] + first, box[0][1] + first), *box[1:])
            for within in _indices(sizes[:leading]):
                place = tuple(a + b for a, b in zip(offsets[:leading], within, strict=True))
                pieces.setdefault(place, []).append(Piece(box, entry, within))
        for place in _indices(info.shape[:leading]):
            name, own = plain_name(template.format(*place)), tuple(pieces.get(place, ()))
            before = tensors[name].pieces if half is not None and name in tensors else ()
            whole = shape if half is None else (2 * shape[0], *shape[1:])
            tensors[name] = Stored(TensorInfo(info.dtype, whole), before + own)
    return tensors


def _indices(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return (
        [tuple(index) for index in torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, len(sizes)).tolist()]
        if sizes
        else [()]
    )
