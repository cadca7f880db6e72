"""The cross-entropy's part of rows of logits: plain torch against the definitions, and the face's choice."""

from __future__ import annotations

import pytest
import torch

from megaforge.kernels import cross_entropy
from megaforge.kernels.cross_entropy import native, score_labels
from megaforge.kernels.cross_entropy.plain import PlainScores
from megaforge.kernels.cross_entropy.triton import TritonScores
from tests.kernels.cross_entropy_cases import *  # noqa: F403


def test_the_device_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    form = native.CompiledScores if native.COMPILED else PlainScores
    assert isinstance(score_labels(logits, target, 3), form)
    assert isinstance(score_labels(logits.double(), target, 3), PlainScores)
    monkeypatch.setattr(cross_entropy, "takes", lambda x: True)
    assert isinstance(score_labels(logits, target, 3), TritonScores)


def test_fp64_is_computed_in_fp64() -> None:
    logits = torch.randn(2, 5, dtype=torch.float64)
    scores = score_labels(logits.clone(), torch.tensor([1, 4]), 5)
    assert torch.equal(scores.picked, logits[[0, 1], [1, 4]]) and scores.sums(scores.peak).dtype == torch.float64
