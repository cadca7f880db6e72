"""Saved tensors of either form, by key: a checkpoint directory of any layout, or one safetensors file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megaforge.checkpoint.boxes import box_of, coverage_error, intersect
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.manifest import read_manifest
from megaforge.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from megaforge.checkpoint.sealed import open_tensors, unlocked
from megaforge.checkpoint.shards import RANK_PREFIX, chunk_name
from megaforge.errors import DamagedCheckpointError, UserError
from megaforge.json_text import parse_json
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import Box

SUFFIX = ".safetensors"
_OPEN_FILES = 32  # mapped at once: a checkpoint of a thousand ranks has more files than a process may open


class TensorInfo(NamedTuple):
    """Type and global shape of a saved tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(ABC):
    """Saved global tensors, read a piece at a time.

    Attributes:
        path: where they are.
        step: iteration at which they were saved.
        metric: the checkpoint's score, or None.
        meta: the JSON values that were saved with them.
        tensors: what there is, by key; what belonged to a rank of its layout is left out.
        encrypted: whether it lies there encrypted.
    """

    path: Path
    step: int
    metric: float | None
    meta: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    encrypted: bool = False

    @abstractmethod
    def read(self, key: str, box: Box | None = None) -> torch.Tensor:
        """The part ``box`` of the tensor ``key`` (None: all of it). May be a view of a mapped file."""


class DirectorySource(TensorSource):
    """A checkpoint directory: a run's ``--save`` directory, whose newest valid one is taken, or one in it.

    Raises:
        UserError: there is none, or it is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = find_checkpoint(directory, ParallelContext.single())
        self._manifest = manifest = unlocked(self.path, read_manifest(self.path))
        self.encrypted = manifest.seal is not None
        self.step, self.metric, self.meta = manifest.step, manifest.metric, manifest.meta
        self.tensors = {
            key: TensorInfo(DTYPES[record.dtype], record.shape)
            for key, record in manifest.tensors.items()
            if not key.startswith(RANK_PREFIX)
        }
        self._files: OrderedDict[str, SafetensorsFile] = OrderedDict()
        self._covered: set[str] = set()

    def read(self, key: str, box: Box | None = None) -> torch.Tensor:
        info, record = self.tensors[key], self._manifest.tensors[key]
        whole = box_of([0] * len(info.shape), info.shape)
        if key not in self._covered:
            self._check_coverage(key, whole)
        box = whole if box is None else box
        result: torch.Tensor | None = None
        for chunk in record.chunks:
            held = box_of(chunk.offsets, chunk.sizes)
            common = intersect(held, box)
            if common is None:
                continue
            saved = self._file(chunk.file).tensor(chunk_name(key, chunk.offsets, chunk.sizes, info.shape))
            part = saved[_slices(common, held)]
            if common == box:
                return part
            result = torch.empty([b - a for a, b in box], dtype=info.dtype) if result is None else result
            result[_slices(common, box)] = part
        return torch.empty([b - a for a, b in box], dtype=info.dtype) if result is None else result

    def _check_coverage(self, key: str, whole: Box) -> None:
        """
        Raises:
            DamagedCheckpointError: the pieces of ``key`` are not each of its elements once.
        """
        error = coverage_error(whole, [box_of(c.offsets, c.sizes) for c in self._manifest.tensors[key].chunks])
        if error is not None:
            raise DamagedCheckpointError(f"{self.path}: {key}: {error}")
        self._covered.add(key)

    def _file(self, name: str) -> SafetensorsFile:
        file = self._files.pop(name, None) or open_tensors(self.path, name, self._manifest)
        self._files[name] = file
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return file


def _slices(box: Box, within: Box) -> tuple[slice, ...]:
    """``box`` in the coordinates of ``within``."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, within, strict=True))


class FileSource(TensorSource):
    """One safetensors file with global names, as :func:`megaforge.checkpoint.convert.write_file` makes it.

    Raises:
        UserError: there is no such file, it is damaged, or its metadata does not say what it holds.
    """

    def __init__(self, file: str | Path, *, packed: bool = False) -> None:
        """``packed``: whether a file of packed weights will do."""
        self.path = Path(file)
        try:
            self._file = SafetensorsFile(self.path)
        except DamagedCheckpointError as error:
            raise UserError(f"--load {error}") from error
        except OSError as error:
            raise UserError(f"--load {file}: it cannot be read ({error.strerror})") from error
        try:
            self.metadata = metadata = self._file.metadata
            self.step, self.meta = int(metadata["step"]), dict(parse_json(metadata["meta"]))
            metric = parse_json(metadata.get("metric", "null"))
            self.metric = None if metric is None else float(metric)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"--load {file}: its metadata does not say which model it is of and at which step ({error!r}); whoever "
                "rewrites a converted file must keep its metadata: save_file(tensors, FILE, "
                "metadata=safe_open(OLD, 'pt').metadata())"
            ) from error
        if "packed" in metadata and not packed:
            raise UserError(
                f"--load {file}: it holds packed codes in place of weights, for tools/generate.py and "
                "tools/evaluate.py; give the checkpoint that it was made from"
            )
        self.tensors = {slot.name: TensorInfo(slot.dtype, slot.shape) for slot in self._file.slots()}

    def read(self, key: str, box: Box | None = None) -> torch.Tensor:
        whole = self._file.tensor(key)
        return whole if box is None else whole[tuple(slice(a, b) for a, b in box)]


def open_source(path: str | Path) -> TensorSource:
    """The saved tensors at ``path``: a file where the name ends in ``.safetensors``, else a directory."""
    return FileSource(path) if Path(path).suffix == SUFFIX else DirectorySource(path)
