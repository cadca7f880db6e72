"""A run that moves from layout to layout, by checkpoint or by one file, learns what one that never stopped learns."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from megaforge.checkpoint.manifest import read_manifest
from megaforge.checkpoint.shards import RANK_PREFIX
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, flags, train
from tests.training.tiny import write_dataset

RANKS = 4
SPLIT = ("--tp", "2", "--pp", "2", "--ep", "2", "--etp", "1")
SHARED = ("--zero", "2", "--ddp-bucket-size", "3000")  # dp 4
STEPS = ("--train-iters", "6", "--eval-interval", "2", "--micro-batch-size", "1", "--log-interval", "100")
TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def convert(monkeypatch: pytest.MonkeyPatch, source: str, target: str, *layout: str) -> str:
    """``source`` through one file into the directory ``target``."""
    file = f"{target}.safetensors"
    for more in (("--load", source, "--save", file, "--optimizer"), ("--load", file, "--save", target, *layout)):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *more])
        assert runpy.run_path(str(TOOL))["main"]() == 0
    return target


def run_pieces(directory: Path) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Where the pieces of each tensor of a run's first checkpoint lie, and how large they are."""
    [first, *_] = sorted(directory.glob("step_*"))
    tensors = {key: kept for key, kept in read_manifest(first).tensors.items() if not key.startswith(RANK_PREFIX)}
    return {key: sorted((tuple(c.offsets), tuple(c.sizes)) for c in kept.chunks) for key, kept in tensors.items()}


@pytest.mark.parametrize(
    ("by_file", "rule", "tolerance"),
    [(False, (), 2e-5), (True, ("--optimizer", "normuon", "--fp64"), 1e-9)],
    ids=["checkpoints", "one file, NorMuon"],
)
def test_tensor_pipeline_and_expert_parallel_to_zero_2_and_back(
    ranks: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_file: bool,
    rule: tuple[str, ...],
    tolerance: float,
) -> None:
    """Metrics, gradients, weights and all that the update rule keeps."""
    prefix, steps = write_dataset(tmp_path / "train_text_document"), (*STEPS, *rule)
    expected = train(flags(prefix, *steps))
    run = str(tmp_path / "run")
    found = [ranks.run(RANKS, train, flags(prefix, *steps, *SPLIT, "--save", run, "--exit-interval", "2"))]
    if by_file:
        run = convert(monkeypatch, run, str(tmp_path / "middle"))
    again = ("--load", run, "--save", run, "--exit-interval", "4")
    found.append(ranks.run(RANKS, train, flags(prefix, *steps, *SHARED, *again), 0.0))
    if by_file:
        written, run = run_pieces(tmp_path / "run"), convert(monkeypatch, run, str(tmp_path / "end"), *SPLIT)
        assert run_pieces(Path(run)) == written, "converted files have the pieces that ranks of the layout write"
    found.append(ranks.run(RANKS, train, flags(prefix, *steps, *SPLIT, "--load", run, "--save", run), 0.0))
    assert [part[0]["executed"] for part in found] == ["pp 2 (1f1b)", "pp 1 (1f1b)", "pp 2 (1f1b)"]
    for rank, outcome in enumerate(found[-1]):
        outcome["records"] = [record for part in found for record in part[rank]["records"]]
    compare(found[-1], expected, tolerance)
