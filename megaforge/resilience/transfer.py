"""Files go from a folder of one rank to that of another, block by block, and are checked by their hash on arrival."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megaforge.checkpoint.hashed_file import HASH, FileRecord
from megaforge.parallel.context import ParallelContext

_BLOCK = 8 << 20


class Move(NamedTuple):
    """One file on its way.

    Attributes:
        name: of the file, in both folders.
        record: its length and hash.
        source: the rank that has it.
        target: the rank that gets it.
    """

    name: str
    record: FileRecord
    source: int
    target: int


class _Stream:
    """This rank's end of a move. An error of the disk does not stop it, as the other end sends or waits."""

    def __init__(self, tag: int, move: Move, folder: Path, sends: bool) -> None:
        self.move, self.problem = move, ""
        self._tag, self._folder, self._sends = tag, folder, sends
        self._buffer = torch.empty(min(_BLOCK, move.record.bytes), dtype=torch.uint8)
        self._digest, self._file = hashlib.new(HASH), self._open()

    @property
    def _arriving(self) -> Path:
        return self._folder / f".arriving_{self.move.name}"

    def _open(self) -> io.FileIO | None:
        try:
            if self._sends:
                return io.FileIO(self._folder / self.move.name, "rb")
            return io.FileIO(self._arriving, "wb")
        except OSError as error:
            self._failed(error)
            return None

    def _failed(self, error: OSError) -> None:
        what = "sent" if self._sends else "received"
        self.problem = self.problem or f"{self.move.name} cannot be {what}: {error.strerror or error}"

    def post(self, start: int, group: dist.ProcessGroup) -> dist.Work | None:
        """Begins to send or receive the block at ``start``."""
        block = self._buffer[: self.move.record.bytes - start]
        if not self._sends:
            return dist.irecv(block, self.move.source, group=group, tag=self._tag)
        if self._file is not None:
            view = block.numpy().data
            try:
                while view and (count := self._file.readinto(view)):
                    view = view[count:]
            except OSError as error:
                self._failed(error)
        return dist.isend(block, self.move.target, group=group, tag=self._tag)

    def settle(self, start: int) -> None:
        """The block at ``start`` is there."""
        if self._sends or self._file is None or self.problem:
            return
        view = self._buffer[: self.move.record.bytes - start].numpy().data
        self._digest.update(view)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._failed(error)

    def finish(self) -> None:
        """The last block is through: what arrived whole has its name."""
        if self._file is None:
            return
        self._file.close()
        if self._sends:
            return
        if not self.problem and self._digest.hexdigest() != self.move.record.sha256:
            self.problem = f"{self.move.name} is not what rank {self.move.source} wrote when it arrives"
        if self.problem:
            self._arriving.unlink(missing_ok=True)
        else:
            os.replace(self._arriving, self._folder / self.move.name)


def move_files(moves: Sequence[Move], folder: Path, ctx: ParallelContext) -> list[str]:
    """Copies files from ``folder`` as their sources see it to ``folder`` as their targets do. Collective: every rank
    gives the same moves.

    Returns:
        What went wrong at this rank; what it receives is there and whole, or not there.
    """
    rank, group = ctx.world.rank, ctx.control
    if group is None:
        return []
    streams = [
        _Stream(tag, move, folder, move.source == rank)
        for tag, move in enumerate(moves)
        if rank in (move.source, move.target)
    ]
    for start in range(0, max((stream.move.record.bytes for stream in streams), default=0), _BLOCK):
        moving = [stream for stream in streams if start < stream.move.record.bytes]
        for work in [stream.post(start, group) for stream in moving]:
            assert work is not None  # it is only where the group is not this rank's
            work.wait()
        for stream in moving:
            stream.settle(start)
    for stream in streams:
        stream.finish()
    return [stream.problem for stream in streams if stream.problem]
