"""The engine of one machine: worker processes, or this process alone where one worker is asked for."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megaforge.config.launcher import discover_launch
from megaforge.data.corpus.engines.engine import Engine, end_with_parent, work_on
from megaforge.data.corpus.progress import Progress
from megaforge.errors import UserError


class LocalEngine(Engine):
    """A pool of ``workers`` processes, started once.

    Attributes:
        alone: whether it is the whole run's engine, and not a rank's.
    """

    alone = True

    def __init__(self, workers: int, output: Path) -> None:
        super().__init__(workers, output)
        launch = discover_launch()
        if launch.world_size > 1 and self.alone:
            raise UserError(f"{launch.launcher} started {launch.world_size} ranks; pass --engine mpi to share the work")
        self._pool: ProcessPoolExecutor | None = None

    def map(self, output: Path, phase: str, task: str, items: Sequence[int], progress: Progress) -> None:
        """See :class:`Engine`."""
        if self.workers == 1 or len(items) == 1:
            for item in items:
                work_on(str(output), phase, task, item)
                progress.advance()
            return
        if self._pool is None:
            # spawn: a fork would copy the threads' locks of the libraries that are loaded already
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=end_with_parent)
        waiting = list(reversed(items))
        running: set[Future[int]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.workers:
                    running.add(self._pool.submit(work_on, str(output), phase, task, waiting.pop()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    progress.advance()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker died (of memory, if the system's log says so); what is finished is kept: run the same "
                "command again, with fewer --workers if memory is short"
            ) from error
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """See :class:`Engine`."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
