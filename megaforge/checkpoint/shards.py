"""A tensor of which this rank holds some rectangular pieces, in the words of torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import Entry, FlatShard
from megaforge.parallel.param_spec import ParamSpec

RANK_PREFIX = "rank_"  # keys of tensors that belong to one rank: rank_00003/NAME


class TensorEntry(NamedTuple):
    """One tensor of a checkpoint: its key there, how it is split, and this rank's part of it.

    Optimizer moments use their parameter's ``spec`` under another ``key``. A rank that holds a range of the flattened
    local tensor (ZeRO) says so by a :class:`FlatShard` in its place, and gives that range, 1-d. None: every rank holds
    the whole tensor, and all of them the same.
    """

    key: str
    spec: ParamSpec | FlatShard | None
    tensor: torch.Tensor


class Shard:
    """The pieces of one global tensor that this rank holds.

    It answers the three questions that torch.distributed.checkpoint's planners ask of any object
    (``__create_write_items__``, ``__create_chunk_list__``, ``__get_tensor_shard__``), so neither DTensor nor
    ShardedTensor is needed, a rank may hold several pieces (q|k|v, gate|up), and any other cut will do as well.

    Args:
        shape: global shape.
        pieces: offsets of each piece in the global tensor, and the piece (a view of this rank's memory).
    """

    def __init__(self, shape: Sequence[int], pieces: Iterable[tuple[Sequence[int], torch.Tensor]]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = {torch.Size(offsets): view.detach() for offsets, view in pieces if view.numel()}

    @classmethod
    def of_entry(cls, entry: TensorEntry, ctx: ParallelContext) -> Shard:
        """The shard that ``entry``'s declaration describes for this rank.

        Raises:
            ValueError: the tensor is not of the local shape that the declaration demands.
        """
        if entry.spec is None:
            return cls.whole(entry.tensor)
        expected = entry.spec.local_shape(ctx)
        if tuple(entry.tensor.shape) != expected:
            raise ValueError(
                f"{entry.key}: local shape {tuple(entry.tensor.shape)}, but its declaration says {expected}"
            )
        return cls(
            entry.spec.shape,
            [
                ([start for start, _ in piece.global_box], piece.local_view(entry.tensor))
                for piece in entry.spec.pieces(ctx)
            ],
        )

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Shard:
        """A tensor that this rank holds entirely."""
        return cls(tensor.shape, [([0] * tensor.dim(), tensor)])

    @property
    def dtype(self) -> torch.dtype | None:
        """Element type, or None when this rank holds nothing."""
        return next((view.dtype for view in self.pieces.values()), None)

    def size(self) -> torch.Size:
        """Global shape, as torch's load planner asks for it."""
        return self.shape

    def __create_write_items__(self, key: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(key, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offsets, sizes=view.shape),
                    properties=TensorProperties(dtype=view.dtype),
                    size=self.shape,
                ),
            )
            for offsets, view in self.pieces.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=offsets, sizes=view.shape) for offsets, view in self.pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        if index.offset is None:
            raise ValueError(f"{index.fqn}: asked for a piece without its offset")
        return self.pieces[index.offset]


def chunk_name(key: str, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> str:
    """A piece's name within a file: ``key[0:4,8:16]``, or plain ``key`` when it is the whole tensor, which leaves
    the checkpoint of a single rank readable as ordinary safetensors."""
    if tuple(sizes) == tuple(shape):
        return key
    ranges = ",".join(f"{offset}:{offset + size}" for offset, size in zip(offsets, sizes, strict=True))
    return f"{key}[{ranges}]"


def build_shards(
    entries: Iterable[Entry],
    rank_tensors: Mapping[str, torch.Tensor],
    ctx: ParallelContext,
) -> dict[str, Shard]:
    """What this rank contributes to, or wants from, a checkpoint: key -> shard.

    Raises:
        ValueError: a key comes twice, is reserved, or a tensor contradicts its declaration.
    """
    shards: dict[str, Shard] = {}
    for entry in entries:
        entry = TensorEntry(*entry)
        if entry.key in shards or entry.key.startswith(RANK_PREFIX) or not entry.key:
            raise ValueError(f"checkpoint key {entry.key!r} is taken twice, empty, or starts with {RANK_PREFIX}")
        shards[entry.key] = Shard.of_entry(entry, ctx)
    for name, tensor in rank_tensors.items():
        shards[f"{RANK_PREFIX}{ctx.world.rank:05d}/{name}"] = Shard.whole(tensor)
    return shards
