"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.parallel.pool import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks, started once: ``ranks.run(world_size, function, *args) -> [result of rank 0, ...]``."""
    pool = RankPool()
    yield pool
    pool.close()
