"""Snapshots in memory: the run's state every few steps, in a folder of each node's shared memory.

A node's folder has one ``step_N`` of the form of any checkpoint, with the files of the node's own ranks and, with
peers, copies of those of the node before it; a load takes what is on any node. The one before stays until the new one
is whole on all nodes, so that at any moment one is. Nothing here needs a disk: it survives what ends a process, and
with peers what takes one node and its memory away.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megaforge.checkpoint.checkpoint import Snapshot
from megaforge.checkpoint.directory import (
    commit,
    commit_fetched,
    discard_temporary,
    list_steps,
    prepare_temporary,
    remove_checkpoint,
    step_name,
    temporary_path,
)
from megaforge.checkpoint.find import check_file, check_length
from megaforge.checkpoint.hashed_file import FileRecord
from megaforge.checkpoint.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    SUMS_FILE,
    Manifest,
    TensorRecord,
    read_manifest,
)
from megaforge.checkpoint.own_file import Held, file_name, held_pieces, tensor_table, write_own_file
from megaforge.checkpoint.sealed import unlocked
from megaforge.errors import CheckpointError, UserError
from megaforge.parallel.agree import exchange, from_first_rank, together
from megaforge.parallel.context import ParallelContext
from megaforge.resilience.nodes import Nodes
from megaforge.resilience.room import free_bytes
from megaforge.resilience.transfer import Move, move_files

logger = logging.getLogger(__name__)

RUN = "snapshot_of"  # in a snapshot's meta: the run that it is of
_BESIDE = 1 << 20  # bytes of what is not tensors, at least


class _Offer(NamedTuple):
    """What a node has of one snapshot: the hash of its list of sums, its files by name, and those that are there."""

    digest: str
    files: Mapping[str, FileRecord]
    there: frozenset[str]


class SnapshotStore:
    """The snapshots of one run.

    Args:
        folder: this node's; it is made, for this user alone.
        nodes: which ranks share one.
        run: who the run is; a snapshot of another one in the folder is not looked at.
        peers: whether each node keeps a copy for the one before it.

    Raises:
        UserError: the folder cannot be, or is somebody else's.
    """

    def __init__(self, ctx: ParallelContext, folder: Path, nodes: Nodes, run: str, *, peers: bool = False) -> None:
        self._ctx, self.folder, self._nodes, self._run = ctx, folder, nodes, run
        self._peers = peers and len(nodes.members) > 1
        self._pieces: list[Held] | None = None
        self._table: dict[str, TensorRecord] = {}
        self._held: list[frozenset[str]] = []
        self._records: Mapping[str, FileRecord] = {}
        self._found: Path | None = None
        together(ctx, lambda: own_folder(folder))

    # What is written

    def need(self, own_bytes: int, ctx: ParallelContext) -> list[int]:
        """Bytes that one snapshot takes on each node, where this rank writes ``own_bytes``. Collective."""
        sizes = exchange(ctx, own_bytes)
        need = [_BESIDE + sum(sizes[rank] for rank in ranks) for ranks in self._nodes.members]
        for rank, target in self._copies():
            need[self._nodes.of(target)] += sizes[rank]
        return need

    def check_room(self, own_bytes: int) -> None:
        """Whether two snapshots fit, as there are while one is written. Collective.

        Raises:
            UserError: on every rank: they do not.
        """
        need = 2 * self.need(own_bytes, self._ctx)[self._nodes.own]
        held = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        together(self._ctx, lambda: self._check_room(need, held))

    def _check_room(self, need: int, held: int = 0) -> None:
        if not self._nodes.leads:
            return
        free = free_bytes(self.folder) + held
        if need > free:
            raise CheckpointError(
                f"--snapshot-interval: snapshots need {need / 1e9:.2f} GB in {self.folder}, and {free / 1e9:.2f} GB "
                "may be taken there; give the machine or container more shared memory (docker run --shm-size), name a "
                "--snapshot-dir with more room, or leave it out"
            )

    def _copies(self) -> list[tuple[int, int]]:
        """Which rank's file goes to which other."""
        if not self._peers:
            return []
        pairs = [(rank, self._nodes.peer(rank)) for ranks in self._nodes.members for rank in ranks]
        return [(rank, target) for rank, target in pairs if target is not None]

    def write(self, snapshot: Snapshot, ctx: ParallelContext) -> Path:
        """Makes ``snapshot``, of which each rank has the pieces that it writes, this node's newest and only one.
        Collective.

        Raises:
            CheckpointError: on every rank: some rank could not; the one before is still there.
        """
        try:
            return self._write(snapshot, ctx)
        finally:
            if self._nodes.leads:
                discard_temporary(self.folder, snapshot.head.step)

    def _write(self, snapshot: Snapshot, ctx: ParallelContext) -> Path:
        head, folder = snapshot.head, temporary_path(self.folder, snapshot.head.step)
        held = held_pieces(snapshot.shards)
        own = sum(view.nbytes for shard in snapshot.shards.values() for view in shard.pieces.values())
        need = self.need(own, ctx)[self._nodes.own]

        def prepare() -> None:
            self._check_room(need)
            if self._nodes.leads:
                _ = prepare_temporary(self.folder, head.step)

        together(ctx, prepare)
        names = [file_name(rank, head.seal) for rank in range(ctx.world.size)]
        name = names[ctx.world.rank]
        record = together(
            ctx, lambda: write_own_file(snapshot.shards, folder, name, head.step, head.seal) if held else None
        )
        records = dict(zip(names, exchange(ctx, record), strict=True))
        files = {name: record for name, record in records.items() if record is not None}
        moves = [
            Move(names[rank], files[names[rank]], rank, target)
            for rank, target in self._copies()
            if names[rank] in files
        ]
        self._move(moves, folder, ctx)
        tensors = self._tensors(held, names, ctx)
        meta, metric = from_first_rank(ctx, lambda: (head.meta | {RUN: self._run}, head.metric))
        manifest = Manifest(head.step, head.layout, meta, metric, files, tensors, head.seal)
        path: Path = together(ctx, lambda: self._publish(manifest))
        if self._nodes.leads:  # all nodes have the new one
            for _, older in list_steps(self.folder):
                if older != path:
                    remove_checkpoint(older)
        return path

    def _publish(self, manifest: Manifest) -> Path:
        path = self.folder / step_name(manifest.step)
        return commit(self.folder, manifest) if self._nodes.leads else path

    def _tensors(self, held: list[Held], names: Sequence[str], ctx: ParallelContext) -> dict[str, TensorRecord]:
        """What all ranks' files hold; asked for anew only where some rank's pieces are others than last time."""
        if any(exchange(ctx, held != self._pieces)):
            self._pieces, self._table = held, tensor_table(exchange(ctx, held), names)
        return self._table

    def _move(self, moves: Sequence[Move], folder: Path, ctx: ParallelContext) -> None:
        """
        Raises:
            CheckpointError: on every rank: a file did not arrive.
        """
        problems = move_files(moves, folder, ctx)

        def check() -> None:
            if problems:
                raise CheckpointError("; ".join(problems))

        if moves:
            together(ctx, check)

    # What is found

    def find(self, newer_than: int) -> Path | None:
        """This node's folder of the newest snapshot after step ``newer_than`` of which every file is whole on some
        node; None where there is none. :meth:`fetch` brings what is elsewhere. Collective."""
        offers = exchange(self._ctx, self._offers() if self._nodes.leads else {})
        for step in sorted({step for offer in offers for step in offer if step > newer_than}, reverse=True):
            for digest in sorted({offer[step].digest for offer in offers if step in offer}):
                having = [offer.get(step) for offer in offers]
                having = [one if one is not None and one.digest == digest else None for one in having]
                missing = self._check(step, having)
                if not missing:
                    self._spread(step, having)
                    return self._found
                if self._ctx.is_first_rank:
                    logger.warning(
                        "the snapshot of step %d in %s is not whole on the nodes that are here (%s); trying an older "
                        "state",
                        step,
                        self.folder,
                        ", ".join(sorted(missing)),
                    )
        return None

    def _offers(self) -> dict[int, _Offer]:
        """What this node has, by step."""
        found = {}
        for step, path in list_steps(self.folder):
            try:
                manifest = unlocked(path, read_manifest(path))
                if manifest.meta.get(RUN) != self._run:
                    continue
                there = frozenset(n for n, record in manifest.files.items() if check_length(path / n, record) is None)
                digest = hashlib.sha256((path / SUMS_FILE).read_bytes()).hexdigest()
                found[step] = _Offer(digest, manifest.files, there)
            except (CheckpointError, OSError) as error:
                logger.warning("the snapshot %s is not used: %s", path, error)
        return found

    def _check(self, step: int, having: Sequence[_Offer | None]) -> set[str]:
        """Reads every file of the snapshot, wherever it is; returns the names of those that are whole nowhere. A
        damaged one is removed, so that a copy of it takes its place. ``having``: by the first rank of each node."""
        members, whole = self._nodes.members, list[str]()
        mine = having[members[self._nodes.own][0]]
        path = self.folder / step_name(step)
        if mine is not None:
            own = members[self._nodes.own]
            for name in sorted(mine.there)[self._nodes.place :: len(own)]:
                problem = check_file(path / name, mine.files[name])
                if problem is None:
                    whole.append(name)
                    continue
                logger.warning("the snapshot %s: %s", path, problem.text)
                (path / name).unlink(missing_ok=True)
        found = exchange(self._ctx, whole)
        self._held = [frozenset(name for rank in ranks for name in found[rank]) for ranks in members]
        files = next(one.files for one in having if one is not None)
        self._records, self._found = files, path
        return set(files).difference(*self._held)

    def _spread(self, step: int, having: Sequence[_Offer | None]) -> None:
        """Nodes without the snapshot get its manifest. Collective."""
        holder = next(rank for rank, one in enumerate(having) if one is not None)
        assert self._found is not None
        path = self._found
        names = (MANIFEST_FILE, SUMS_FILE, SIGNATURE_FILE)
        small: dict[str, bytes] = {}
        if self._ctx.world.rank == holder:
            small = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
        content = exchange(self._ctx, small)[holder]

        def take() -> None:
            if not self._nodes.leads or having[self._ctx.world.rank] is not None:
                return
            if path.exists():
                shutil.rmtree(path)
            _ = commit_fetched(self.folder, step, fill)

        def fill(temporary: Path) -> None:
            for name, text in content.items():
                (temporary / name).write_bytes(text)

        together(self._ctx, take)

    def fetch(self, names: Iterable[str]) -> None:
        """Brings the files ``names`` of the snapshot that was found to this node, where it has them not. Collective.

        Raises:
            CheckpointError: on every rank: one did not arrive.
        """
        wanted = exchange(self._ctx, frozenset(names))
        moves, members = list[Move](), self._nodes.members
        for node, ranks in enumerate(members):
            lacking = frozenset[str]().union(*(wanted[rank] for rank in ranks)) - self._held[node]
            for number, name in enumerate(sorted(lacking)):
                there = next(ranks for ranks, held in zip(members, self._held, strict=True) if name in held)
                source, target = there[number % len(there)], ranks[number % len(ranks)]
                moves.append(Move(name, self._records[name], source, target))
            self._held[node] |= lacking
        assert self._found is not None
        self._move(moves, self._found, self._ctx)

    def clear(self, keep: Path | None = None) -> None:
        """Removes what is in this node's folder but ``keep``. Collective."""

        def remove() -> None:
            for path in self.folder.iterdir() if self._nodes.leads else ():
                if path != keep:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

        together(self._ctx, remove)

    def remove(self) -> None:
        """Removes this node's folder. Collective."""
        together(self._ctx, lambda: shutil.rmtree(self.folder) if self._nodes.leads else None)


def own_folder(folder: Path) -> None:
    """Makes ``folder``, and makes sure that nobody else may write there.

    Raises:
        UserError: it cannot be made, or is somebody else's.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = os.lstat(folder)
    except OSError as error:
        raise UserError(f"--snapshot-dir {folder}: {error.strerror}; name another directory") from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise UserError(f"--snapshot-dir {folder}: it is somebody else's, or others may write there; name another one")
