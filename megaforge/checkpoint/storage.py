"""Storage of torch.distributed.checkpoint: one safetensors file a rank, and the manifest of them all.

The order of events in ``dcp.save``: every rank plans; rank 0 makes the temporary directory and deals the pieces out;
every rank writes and fsyncs its file; all results, or failures, reach rank 0; only when nobody failed does it know the
manifest, with which the directory can be committed. Torch tells every rank about a failure of any.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megaforge.checkpoint import directory as directories
from megaforge.checkpoint.encryption import ENCRYPTED_SUFFIX, Seal
from megaforge.checkpoint.hashed_file import FileRecord
from megaforge.checkpoint.manifest import ChunkRecord, Manifest, TensorRecord
from megaforge.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    DTYPES,
    SafetensorsFile,
    Slot,
    file_order,
    write_safetensors,
)
from megaforge.checkpoint.sealed import open_tensors
from megaforge.checkpoint.shards import chunk_name
from megaforge.errors import CheckpointError, DamagedCheckpointError
from megaforge.fault_points import reach


@dataclass(frozen=True)
class CheckpointHead:
    """The fields of a manifest that are known before anything is written."""

    step: int
    layout: Mapping[str, int]
    meta: dict[str, Any]
    metric: float | None
    seal: Seal | None = None  # what encrypts its files


class _Written(NamedTuple):
    """What a rank reports about one piece: the file it is in, and that whole file's record."""

    file: str
    record: FileRecord


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _slot_of(item: WriteItem) -> Slot:
    data = item.tensor_data
    if data is None:
        raise ValueError(f"{item.index.fqn}: only tensors go into a checkpoint file")
    chunk = data.chunk
    return Slot(
        chunk_name(item.index.fqn, chunk.offsets, chunk.sizes, data.size), data.properties.dtype, tuple(chunk.sizes)
    )


class CheckpointWriter(StorageWriter):
    """Writes the files of one step's checkpoint below ``directory``; ``rank`` names this rank's file.

    Attributes:
        manifest: on rank 0, once every rank has reported success: what the files hold.
    """

    def __init__(self, directory: Path, head: CheckpointHead, rank: int) -> None:
        self.directory = directory
        self.head = head
        self.rank = rank
        self.manifest: Manifest | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # never chosen by a path's look

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing carries over from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Needs no set-up: the directory is made once every rank has a plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0, before any rank writes: a fresh temporary directory."""
        directories.prepare_temporary(self.directory, self.head.step)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file, hashed on the way and fsynced; a rank with nothing to write makes none."""
        if not plan.items:
            return _done([])
        pairs = sorted(((_slot_of(item), item) for item in plan.items), key=lambda pair: file_order(pair[0]))
        seal = self.head.seal
        name = f"rank_{self.rank:05d}.safetensors{ENCRYPTED_SUFFIX if seal else ''}"
        tensors = (self._tensor(planner, item) for _, item in pairs)
        path = directories.temporary_path(self.directory, self.head.step) / name
        encrypt = None if seal is None else partial(seal.encryptor, self.head.step, name)
        written = _Written(name, write_safetensors(path, [slot for slot, _ in pairs], tensors, seal=encrypt))
        return _done([WriteResult(item.index, slot.nbytes, written) for slot, item in pairs])

    def _tensor(self, planner: SavePlanner, item: WriteItem) -> torch.Tensor:
        reach("write", iteration=self.head.step)
        data = planner.resolve_data(item)
        if not isinstance(data, torch.Tensor):
            raise ValueError(f"{item.index.fqn}: only tensors go into a checkpoint file")
        return data

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0, when every rank has reported success: the manifest.

        Raises:
            CheckpointError: a file that another rank wrote is not visible here.
        """
        placed = {result.index: result.storage_data for rank_results in results for result in rank_results}
        files = {written.file: written.record for written in placed.values()}
        temporary = directories.temporary_path(self.directory, self.head.step)
        for name, record in files.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != record.bytes:
                raise CheckpointError(
                    f"--save {self.directory}: {name} was written by another rank but rank 0 does not see it; "
                    "checkpoints need a file system that all ranks share"
                )
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor, TensorStorageMetadata):
                raise ValueError(f"{key}: only tensors go into a checkpoint file")
            chunks = tuple(
                ChunkRecord(placed[MetadataIndex(key, chunk.offsets)].file, tuple(chunk.offsets), tuple(chunk.sizes))
                for chunk in tensor.chunks
            )
            tensors[key] = TensorRecord(DTYPE_NAMES[tensor.properties.dtype], tuple(tensor.size), chunks)
        head = self.head
        self.manifest = Manifest(head.step, head.layout, head.meta, head.metric, files, tensors, head.seal)


class CheckpointReader(StorageReader):
    """Reads the checkpoint ``path``, described by ``manifest``, unlocked; only the bytes that the plan asks for.

    ``fetch`` is first told, on every rank, the names of the files that this rank's plan asks for.
    """

    def __init__(self, path: Path, manifest: Manifest, fetch: Callable[[set[str]], None] | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.fetch = fetch

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing carries over from one load to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest in torch's words."""
        tensors = {}
        for key, record in self.manifest.tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in record.chunks
            ]
            properties = TensorProperties(dtype=DTYPES[record.dtype])
            tensors[key] = TensorStorageMetadata(properties=properties, size=torch.Size(record.shape), chunks=chunks)
        return Metadata(state_dict_metadata=dict(tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Files are opened when they are read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies each planned box from the mapped files into the planner's tensors, file by file."""
        by_file: dict[str, list[tuple[ReadItem, str]]] = defaultdict(list)
        for item in plan.items:
            record, chunk = self._chunk(item.storage_index)
            by_file[chunk.file].append(
                (item, chunk_name(item.storage_index.fqn, chunk.offsets, chunk.sizes, record.shape))
            )
        if self.fetch is not None:
            self.fetch(set(by_file))
        for name, items in by_file.items():
            try:
                file = open_tensors(self.path, name, self.manifest)
            except FileNotFoundError as error:
                raise DamagedCheckpointError(f"{self.path / name} is missing") from error
            for item, tensor_name in items:
                self._copy(item, file, tensor_name, planner)
        return _done(None)

    def _chunk(self, index: MetadataIndex) -> tuple[TensorRecord, ChunkRecord]:
        record = self.manifest.tensors[index.fqn]
        if index.index is None:
            raise ValueError(f"{index.fqn}: a read was planned without the number of the saved piece")
        return record, record.chunks[index.index]

    def _copy(self, item: ReadItem, file: SafetensorsFile, name: str, planner: LoadPlanner) -> None:
        record, chunk = self._chunk(item.storage_index)
        slot = file.slot(name)
        if slot.shape != chunk.sizes or slot.dtype != DTYPES[record.dtype]:
            raise DamagedCheckpointError(
                f"{self.path / chunk.file}: {item.storage_index.fqn} is {slot.dtype} {slot.shape}, "
                f"the manifest says {record.dtype} {chunk.sizes}"
            )
        box = tuple(
            slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
        )
        target = planner.resolve_tensor(item)
        if tuple(item.lengths) == chunk.sizes:
            file.fill(name, target)
        else:
            target.copy_(file.tensor(name)[box])
        planner.commit_tensor(item, target)
