"""Planners of torch.distributed.checkpoint for :class:`~megaforge.checkpoint.shards.Shard` objects.

Three differences from the defaults: replicated pieces are dealt out by the bytes of the piece (torch counts the whole
tensor's), a load checks that every element it wants is there exactly once, and nothing is ever pickled to a file.
"""

from __future__ import annotations

import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem

from megaforge.checkpoint.boxes import box_of, coverage_error
from megaforge.checkpoint.shards import RANK_PREFIX, Shard
from megaforge.errors import CheckpointError
from megaforge.parallel.param_spec import Box

_SHOWN = 5  # keys that a message lists before it counts the rest


def _listing(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    rest = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + rest


def _data_of(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise ValueError(f"{item.index.fqn}: only tensors go into a checkpoint; other values belong into its meta data")
    return item.tensor_data


def _chunk_bytes(item: WriteItem) -> int:
    data = _data_of(item)
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize


def deal_out(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """The same plans with each piece written by one of the ranks that hold it, their bytes balanced.

    Pieces of one holder count first; then the shared ones, largest first, each to its least loaded holder.

    Raises:
        ValueError: ranks disagree about a tensor's shape or type, or their pieces do not make up the tensor.
    """
    holders: dict[MetadataIndex, list[int]] = defaultdict(list)
    items: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            first = items.setdefault(item.index, item)
            if _data_of(first) != _data_of(item):
                raise ValueError(
                    f"{item.index.fqn}: ranks {rank} and {holders[item.index][0]} hold different pieces at one place: "
                    f"{_data_of(item)} and {_data_of(first)}"
                )
            holders[item.index].append(rank)
    _check_pieces(items.values())
    load = [0] * len(plans)
    chosen: list[list[WriteItem]] = [[] for _ in plans]
    order = sorted(items.values(), key=lambda item: (len(holders[item.index]) > 1, -_chunk_bytes(item)))
    for item in order:
        rank = min(holders[item.index], key=load.__getitem__)
        load[rank] += _chunk_bytes(item)
        chosen[rank].append(item)
    return [dataclasses.replace(plan, items=kept) for plan, kept in zip(plans, chosen, strict=True)]


def _check_pieces(items: Iterable[WriteItem]) -> None:
    """Raises ValueError unless the pieces of every tensor cover it exactly once."""
    tensors: dict[str, tuple[TensorWriteData, list[Box]]] = {}
    for item in items:
        data = _data_of(item)
        first, boxes = tensors.setdefault(item.index.fqn, (data, []))
        if (first.size, first.properties.dtype) != (data.size, data.properties.dtype):
            raise ValueError(
                f"{item.index.fqn}: ranks disagree about it: {first.properties.dtype} {tuple(first.size)} "
                f"and {data.properties.dtype} {tuple(data.size)}"
            )
        boxes.append(box_of(data.chunk.offsets, data.chunk.sizes))
    for key, (data, boxes) in tensors.items():
        problem = coverage_error(box_of([0] * len(data.size), data.size), boxes)
        if problem:
            raise ValueError(f"{key}: {problem}")


class ShardSavePlanner(DefaultSavePlanner):
    """Plans the writing of ``{key: Shard}``."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: Mapping[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = dict(state_dict)
        self.is_coordinator = is_coordinator

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return super().create_global_plan(deal_out(all_plans))

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        shard: Shard = self.state_dict[index.fqn]
        return shard.__get_tensor_shard__(index)

    def transform_object(self, write_item: WriteItem, object: Any) -> torch.Tensor:
        if not isinstance(object, torch.Tensor):
            raise ValueError(f"{write_item.index.fqn}: only tensors go into a checkpoint file")
        return object


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans the filling of ``{key: Shard}`` in place from whatever pieces were saved.

    Args:
        allow_extra: prefixes of saved keys that may go unread.
        cast: whether a saved element type other than the wanted one is converted; otherwise it is an error.
    """

    def __init__(self, allow_extra: tuple[str, ...] = (), cast: bool = False) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.allow_extra = (*allow_extra, RANK_PREFIX)
        self.cast = cast

    def set_up_planner(
        self, state_dict: Mapping[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The inherited method would turn every Shard into None: it rebuilds what it does not know.
        self.state_dict = dict(state_dict)
        self.original_state_dict = self.state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """This rank's reads.

        Raises:
            CheckpointError: a key is missing, of another shape or type, or not covered by what was saved.
        """
        if self.metadata is None:
            raise ValueError("a load plan needs the checkpoint's metadata")
        saved = self.metadata.state_dict_metadata
        missing = self.state_dict.keys() - saved.keys()
        if missing:
            raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors that are wanted: {_listing(missing)}")
        for key, shard in self.state_dict.items():
            self._check_tensor(key, shard, saved[key])
        plan = super().create_local_plan()
        self._check_coverage(plan)
        return dataclasses.replace(plan, planner_data=sorted(self.state_dict))

    def _check_tensor(self, key: str, shard: Shard, saved: Any) -> None:
        if not isinstance(saved, TensorStorageMetadata):
            raise CheckpointError(f"{key}: the checkpoint holds no tensor of this name")
        if saved.size != shard.shape:
            raise CheckpointError(f"{key}: shape {tuple(saved.size)} in the checkpoint, {tuple(shard.shape)} here")
        if not self.cast and shard.dtype not in (None, saved.properties.dtype):
            raise CheckpointError(f"{key}: {saved.properties.dtype} in the checkpoint, {shard.dtype} here")

    def _check_coverage(self, plan: LoadPlan) -> None:
        reads: dict[MetadataIndex, list[Box]] = defaultdict(list)
        for item in plan.items:
            reads[item.dest_index].append(box_of(item.dest_offsets, item.lengths))
        for key, shard in self.state_dict.items():
            for offsets, view in shard.pieces.items():
                problem = coverage_error(box_of([0] * view.dim(), view.shape), reads[MetadataIndex(key, offsets)])
                if problem:
                    raise CheckpointError(
                        f"{key}: the checkpoint does not fill the piece at {tuple(offsets)}: {problem}"
                    )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Refuses a checkpoint with tensors that no rank asks for.

        Raises:
            CheckpointError: naming them.
        """
        if self.metadata is None:
            raise ValueError("a load plan needs the checkpoint's metadata")
        wanted = {key for plan in global_plan for key in plan.planner_data}
        extra = [
            key
            for key in self.metadata.state_dict_metadata
            if key not in wanted and not key.startswith(self.allow_extra)
        ]
        if extra:
            raise CheckpointError(
                f"the checkpoint holds {len(extra)} tensors that nothing here asks for: {_listing(extra)}"
            )
        return [dataclasses.replace(plan, planner_data=None) for plan in global_plan]

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        shard: Shard = self.state_dict[index.fqn]
        return shard.__get_tensor_shard__(index)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: the checkpoint holds bytes where a tensor belongs")
