"""A pool of processes that become gloo ranks on demand: torch is imported once a session, not once a test."""

from __future__ import annotations

import datetime
import gc
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from megaforge.parallel.distributed import RECORDER


def _serve(index: int, inbox: Any, outbox: Any) -> None:
    os.environ.update(RECORDER, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    while True:
        try:
            job = inbox.get()  # imports the module of the function: what that raises is an answer, too
            if job is None:
                return
            function, args, world_size, store_path = job
            outbox.put((index, True, _as_rank(function, args, index, world_size, store_path)))
        except BaseException:
            outbox.put((index, False, traceback.format_exc()))


def _as_rank(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, store_path: str) -> Any:
    import torch.distributed as dist

    store = dist.FileStore(store_path, world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=240)
    )
    try:
        # A function that ends at once must not close its connections while another rank is still making them.
        dist.barrier()
        return function(*args)
    finally:
        dist.destroy_process_group()
        # A model is a cycle that holds groups, and a living group keeps its threads. What is left after the collection
        # (modules) is frozen, so that the next collection need not look at it.
        gc.collect()
        gc.freeze()


class RankPool:
    """Runs module-level functions on the first ``world_size`` of its processes, as ranks of a fresh gloo group."""

    def __init__(self) -> None:
        self._spawn = mp.get_context("spawn")
        self._inboxes: list[Any] = []
        self._processes: list[Any] = []
        self._outbox = self._spawn.Queue()

    def _grow(self, size: int) -> None:
        while len(self._processes) < size:
            inbox = self._spawn.Queue()
            process = self._spawn.Process(target=_serve, args=(len(self._processes), inbox, self._outbox), daemon=True)
            process.start()
            self._inboxes.append(inbox)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` in each of ``world_size`` ranks; the results by rank.

        Raises:
            AssertionError: a rank raised, ended, or gave no answer for ten minutes; all tracebacks are in the message.
                The pool is started anew afterwards.
        """
        self._grow(world_size)
        with tempfile.TemporaryDirectory() as folder:
            for inbox in self._inboxes[:world_size]:
                inbox.put((function, args, world_size, os.path.join(folder, "store")))
            results: dict[int, Any] = {}
            failures: dict[int, str] = {}
            deadline = time.monotonic() + 600
            while len(results) + len(failures) < world_size:
                try:
                    index, fine, value = self._outbox.get(timeout=1)
                    (results if fine else failures)[index] = value
                except queue.Empty:
                    late = [rank for rank in range(world_size) if rank not in results and rank not in failures]
                    ended = [rank for rank in late if not self._processes[rank].is_alive()]
                    if ended or time.monotonic() > deadline:
                        failures |= {rank: f"no answer; exit code {self._processes[rank].exitcode}" for rank in late}
        if failures:
            self.close()
            raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Ends the processes."""
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self._inboxes, self._processes = [], []
        self._outbox = self._spawn.Queue()
