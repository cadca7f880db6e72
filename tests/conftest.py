"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from megaforge.data.task_tokenizer import make_task_tokenizer
from tests.parallel.pool import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks, started once: ``ranks.run(world_size, function, *args) -> [result of rank 0, ...]``."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the words of ``kv_chunks``."""
    path = tmp_path_factory.mktemp("words") / "words.json"
    make_task_tokenizer(["kv_chunks"], str(path))
    return path
