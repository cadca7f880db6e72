"""Moments in host memory: the same numbers, less memory on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.optim import paged_adam
from megaforge.optim.paged_adam import PagedAdam
from megaforge.parallel.context import ParallelContext
from tests.training.tiny import arguments, make_trainer, weights, write_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("chunk", [PagedAdam.chunk, 10_007])
def test_paging_changes_nothing_but_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(PagedAdam, "chunk", chunk)
    monkeypatch.setattr(paged_adam, "_bitsandbytes", lambda: None)
    prefix = write_dataset(tmp_path / "train_text_document")
    found, held = [], []
    for rule in ("adam", "paged_adam"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        argv = arguments(
            prefix, "--device", "cuda", "--deterministic", "--hidden-size", "256", "--rwkv-head-size", "64"
        )
        trainer = make_trainer([*argv, "--optimizer", rule], ParallelContext.single("cuda"))
        trainer.train()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        found.append({name: tensor.cpu() for name, tensor in weights(trainer).items()})
        moments = [tensor for _, _, tensor in trainer.optimizer.state_entries()]
        assert all(tensor.is_pinned() == (rule == "paged_adam") for tensor in moments)
        elements = sum(tensor.numel() for tensor in moments)
        del trainer, moments
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    assert held[0] - held[1] > 0.9 * 4 * elements
