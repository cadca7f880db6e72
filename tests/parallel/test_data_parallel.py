"""What the gradient reducer does that no layout shows."""

from __future__ import annotations

import gc
import os

import torch

from tests.parallel.context_parallel.test_shard import PACKED, Shape, train
from tests.parallel.pool import RankPool


def threads_of_a_trained_model() -> int:
    train("attention", Shape(2, tp=2), torch.float32, PACKED)
    gc.collect()
    return len(os.listdir("/proc/self/task"))


def test_a_model_takes_its_groups_with_it(ranks: RankPool) -> None:
    """A model holds process groups and they hold threads: a cycle that no collector sees would keep them for good."""
    counts = [ranks.run(2, threads_of_a_trained_model) for _ in range(4)]
    assert counts[3] == counts[1], counts  # after the first, which starts pools of its own
