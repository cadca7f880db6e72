"""One rank's file of a checkpoint, and the table of what all ranks' files hold, where no planner is asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megaforge.checkpoint.encryption import ENCRYPTED_SUFFIX, Seal
from megaforge.checkpoint.hashed_file import FileRecord
from megaforge.checkpoint.manifest import ChunkRecord, TensorRecord
from megaforge.checkpoint.safetensors_file import DTYPE_NAMES, Slot, file_order, write_safetensors
from megaforge.checkpoint.shards import Shard, chunk_name


class Held(NamedTuple):
    """One piece of a tensor in a file: the tensor's key, type and shape, and the piece's box."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def file_name(rank: int, seal: Seal | None) -> str:
    """Name of the file of ``rank``."""
    return f"rank_{rank:05d}.safetensors{ENCRYPTED_SUFFIX if seal else ''}"


def held_pieces(shards: Mapping[str, Shard]) -> list[Held]:
    """The pieces of ``shards``."""
    return [
        Held(key, DTYPE_NAMES[view.dtype], tuple(shard.shape), tuple(offsets), tuple(view.shape))
        for key, shard in shards.items()
        for offsets, view in shard.pieces.items()
    ]


def write_own_file(shards: Mapping[str, Shard], folder: Path, name: str, step: int, seal: Seal | None) -> FileRecord:
    """Writes all pieces of ``shards`` to ``name`` in ``folder``, encrypted where there is a ``seal``.

    Raises:
        OSError: it cannot be written.
    """
    pieces = sorted(
        (
            (Slot(chunk_name(key, offsets, view.shape, shard.shape), view.dtype, tuple(view.shape)), view)
            for key, shard in shards.items()
            for offsets, view in shard.pieces.items()
        ),
        key=lambda pair: file_order(pair[0]),
    )
    encrypt = None if seal is None else partial(seal.encryptor, step, name)
    return write_safetensors(folder / name, [slot for slot, _ in pieces], (view for _, view in pieces), seal=encrypt)


def tensor_table(held: Sequence[Iterable[Held]], names: Sequence[str]) -> dict[str, TensorRecord]:
    """What the files ``names`` hold, each of which has the pieces ``held`` of its rank."""
    shapes: dict[str, Held] = {}
    chunks: dict[str, list[ChunkRecord]] = defaultdict(list)
    for name, pieces in zip(names, held, strict=True):
        for piece in pieces:
            shapes.setdefault(piece.key, piece)
            chunks[piece.key].append(ChunkRecord(name, piece.offsets, piece.sizes))
    return {key: TensorRecord(piece.dtype, piece.shape, tuple(chunks[key])) for key, piece in shapes.items()}
