"""Activations in host memory: the same numbers, less memory on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.nn.offload import HostMemory
from megaforge.parallel.context import ParallelContext
from tests.training.tiny import arguments, make_trainer, record, write_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def train(prefix: str, *more: str) -> tuple[list[dict[str, Any]], int]:
    """The records of two steps, and the bytes that they took at most besides what was there before."""
    shape = ("--hidden-size", "256", "--rwkv-head-size", "64", "--seq-length", "512", "--global-batch-size", "4")
    argv = arguments(prefix, "--device", "cuda", *shape, "--fp64", "--train-iters", "2", *more)
    trainer = make_trainer(argv, ParallelContext.single("cuda"))
    recorder = record(trainer)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return recorder.records, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_offloading_changes_nothing_but_memory(tmp_path: Path, recompute: str) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    expected, whole = train(prefix)
    records, kept = train(prefix, "--cpu-offload-activations", "--recompute", recompute)
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-10)
    assert kept < whole


def test_the_copies_go_beside_the_computation_and_change_no_bit() -> None:
    """Much larger than what is on its way at once, and other work between: memory is used again while copies run."""
    weights = [torch.randn(2048, 2048, device="cuda", requires_grad=True) for _ in range(12)]
    x = torch.randn(4096, 2048, device="cuda")

    def loss() -> torch.Tensor:
        y = x
        for weight in weights:
            y = torch.tanh(y @ weight / 45)
        return y.square().sum()

    expected = torch.autograd.grad(loss(), weights)
    for _ in range(5):
        with HostMemory(weights):
            kept = loss()
        for ours, theirs in zip(torch.autograd.grad(kept, weights), expected, strict=True):
            assert torch.equal(ours, theirs)
