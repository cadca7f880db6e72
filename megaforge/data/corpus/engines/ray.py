"""The engine of a Ray cluster that is running already, whose nodes share the file system of the output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megaforge
from megaforge.data.corpus.engines.engine import Engine, work_on
from megaforge.data.corpus.progress import Progress
from megaforge.errors import UserError, require

_RETRIES = 3  # of a task whose node died; a user's mistake is not tried again


class RayEngine(Engine):
    """A Ray task for each item, as many at a time as the cluster has processors; ``workers`` tokenise, on this node."""

    def __init__(self, workers: int, output: Path) -> None:
        super().__init__(workers, output)
        self._ray = require("ray", extra="cluster", purpose="--engine ray")
        root = str(Path(megaforge.__file__).resolve().parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        try:
            self._ray.init(
                address=os.environ.get("RAY_ADDRESS", "auto"),
                runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--engine ray: no Ray cluster answers ({error}); start one with 'ray start --head', or name one with "
                "RAY_ADDRESS=HOST:PORT"
            ) from error
        self._task = self._ray.remote(num_cpus=1, max_retries=_RETRIES)(work_on)

    def map(self, output: Path, phase: str, task: str, items: Sequence[int], progress: Progress) -> None:
        """See :class:`Engine`."""
        waiting, running = list(reversed(items)), list[Any]()
        most = 2 * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    running.append(self._task.remote(str(output), phase, task, waiting.pop()))
                done, running = self._ray.wait(running)
                self._ray.get(done)
                progress.advance()
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayError as error:
            raise UserError(f"--engine ray: {error}; what is finished is kept: run the same command again") from error
        finally:
            for reference in running:
                self._ray.cancel(reference)

    def close(self) -> None:
        """See :class:`Engine`."""
        self._ray.shutdown()
