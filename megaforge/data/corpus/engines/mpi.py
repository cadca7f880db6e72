"""The engine of several machines under mpirun or srun: every rank runs the same command and does its share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megaforge.data.corpus.engines.engine import Engine
from megaforge.data.corpus.engines.local import LocalEngine
from megaforge.data.corpus.progress import Progress
from megaforge.data.outputs import make_parents
from megaforge.data.preprocess.ranks import discover_ranks


class _OfARank(LocalEngine):
    """The processes of one rank."""

    alone = False


class MpiEngine(Engine):
    """Ranks on a file system that they share, each with ``workers`` processes. Item k belongs to rank k modulo their
    number, so no rank needs to know what another has finished."""

    def __init__(self, workers: int, output: Path) -> None:
        super().__init__(workers, output)
        make_parents(output, "--output")
        self.group = discover_ranks(str(output))
        self._local = _OfARank(workers, output)

    def map(self, output: Path, phase: str, task: str, items: Sequence[int], progress: Progress) -> None:
        """See :class:`Engine`; returns when this rank's items are finished."""
        own = [item for item in items if item % self.group.size == self.group.rank]
        if own:
            self._local.map(output, phase, task, own, progress)

    def close(self) -> None:
        """See :class:`Engine`."""
        self._local.close()
        self.group.close()
