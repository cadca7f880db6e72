"""Runs a rank's shards: in this process for one worker, else in worker processes that each own a shard at a time."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

import megaforge
from megaforge.data.preprocess.plan import Shard, ShardQueue
from megaforge.data.preprocess.progress import Progress
from megaforge.data.preprocess.shard import Encoder, ShardTokenizer, WorkerSpec
from megaforge.errors import UserError

# One thread a worker: the workers are the parallelism, and a second level would only fight them for the cores.
_WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def single_threaded() -> None:
    """Asks the libraries that this process has yet to load to use one thread."""
    for name, value in _WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def run_shards(
    queue: ShardQueue, spec: WorkerSpec, workers: int, progress: Progress, encoder: Encoder | None = None
) -> None:
    """Works the queue off; a single worker can use the ``encoder`` that this process may have made already.

    Raises:
        UserError: a worker met one, or died.
    """
    if workers == 1:
        tokenizer = ShardTokenizer(spec, encoder)
        while (shard := queue.next()) is not None:
            queue.finished(shard, tokenizer.run(shard, progress.advance)["end"])
        return
    pool = _Pool(queue, spec, progress)
    try:
        pool.run(workers)
    finally:
        pool.stop()


class _Pool:
    def __init__(self, queue: ShardQueue, spec: WorkerSpec, progress: Progress) -> None:
        self._queue, self._spec, self._progress = queue, spec, progress
        self._selector = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._current: dict[int, Shard] = {}
        self._partial: dict[int, bytes] = {}

    def run(self, workers: int) -> None:
        for _ in range(workers):
            shard = self._queue.next()
            if shard is None:
                break
            process = self._start()
            self._send(process, self._spec.to_json())
            self._assign(process, shard)
        while self._selector.get_map():
            for key, _ in self._selector.select():
                self._receive(key.data)

    def stop(self) -> None:
        """Ends the workers that this pool started; after success none is left."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        continue
        self._selector.close()

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(megaforge.__file__).resolve().parent.parent)
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        process = subprocess.Popen(
            [sys.executable, "-m", "megaforge.data.preprocess.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_WORKER_ENVIRONMENT, "PYTHONPATH": path},
        )
        self._processes.append(process)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, process)
        return process

    def _assign(self, process: subprocess.Popen[bytes], shard: Shard | None) -> None:
        if shard is None:
            assert process.stdin is not None
            process.stdin.close()
            return
        self._current[process.pid] = shard
        self._send(process, shard.to_json())

    def _send(self, process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return  # the worker is gone; its end of the other pipe says so in a moment

    def _receive(self, process: subprocess.Popen[bytes]) -> None:
        # os.read, not readline: a line left in a buffer of ours would not wake the selector.
        stream = process.stdout
        assert stream is not None
        data = os.read(stream.fileno(), 1 << 16)
        if not data:
            self._selector.unregister(stream)
            if process.wait() != 0:
                raise UserError(
                    f"a preprocessing worker ended with status {process.returncode} (out of memory if it is -9); "
                    "the finished shards are kept: run the same command again, with fewer --workers if memory is short"
                )
            return
        *lines, self._partial[process.pid] = (self._partial.get(process.pid, b"") + data).split(b"\n")
        for line in lines:
            self._handle(process, json.loads(line))

    def _handle(self, process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        if "error" in message:
            raise UserError(message["error"])
        if "progress" in message:
            self._progress.advance(*message["progress"])
        else:
            self._queue.finished(self._current.pop(process.pid), message["done"])
            self._assign(process, self._queue.next())
