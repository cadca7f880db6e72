"""A run holds the lock of its ``--save`` from its beginning to its end, and passes the points of faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge import fault_points
from megaforge.checkpoint.lock import LOCK_FILE
from tests.training.tiny import arguments, make_trainer, write_dataset


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "data")


def test_a_run_holds_its_directory_and_passes_every_point(prefix: str, tmp_path: Path) -> None:
    save, seen = tmp_path / "run", []
    line = arguments(prefix, "--save", str(save), "--load", str(save), "--save-interval", "1")
    fault_points.arm(lambda point, where: seen.append((point, where.get("iteration"), (save / LOCK_FILE).exists())))
    try:
        make_trainer([*line, "--train-iters", "1"]).train()
        make_trainer([*line, "--train-iters", "2"]).train()
    finally:
        fault_points.arm(None)
    assert not (save / LOCK_FILE).exists()
    assert {held for *_, held in seen} == {True}
    found = list(dict.fromkeys((point, iteration) for point, iteration, _ in seen))
    step = ("step", "gradients", "write", "rename", "latest")
    assert found == [*((point, 1) for point in step), ("load", None), *((point, 2) for point in step)]
