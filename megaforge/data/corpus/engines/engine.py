"""What runs the tasks of a corpus: maps a function over items, of which each publishes its own result."""

from __future__ import annotations

import importlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from megaforge.data.corpus.progress import Progress
from megaforge.data.preprocess.ranks import RankGroup, SingleRank

_PARENT_SECONDS = 1.0


class Engine(ABC):
    """A map over tasks.

    Attributes:
        group: the processes that all run the same command; one of them leads.
    """

    group: RankGroup = SingleRank()

    def __init__(self, workers: int, output: Path) -> None:
        """
        Args:
            workers: processes, on each rank.
            output: the directory of the corpus.
        """
        self.workers = workers

    @abstractmethod
    def map(self, output: Path, phase: str, task: str, items: Sequence[int], progress: Progress) -> None:
        """Runs :func:`megaforge.data.corpus.tasks.run_task` on every item; all are finished when it returns.

        Raises:
            UserError: one of them failed; the others that were running are finished or left for the next run.
        """

    def close(self) -> None:  # noqa: B027  most have nothing to end
        """Ends what the engine started."""


def work_on(output: str, phase: str, task: str, item: int) -> int:
    """One task, wherever it runs; returns the item."""
    run: Callable[[str, str, str, int], None] = importlib.import_module("megaforge.data.corpus.tasks").run_task
    run(output, phase, task, item)
    return item


def end_with_parent() -> None:
    """Ends this worker once its parent is gone, however the parent ended: what is in flight is lost, nothing else."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
