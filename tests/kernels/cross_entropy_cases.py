"""A form of the cross-entropy's part of rows of logits against the definitions.

``test_cross_entropy.py`` runs these in plain torch, ``test_triton.py`` with the kernels in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from megaforge.kernels.cross_entropy.plain import PlainScores, Scores
from megaforge.kernels.cross_entropy.reference import label_gradients_reference, label_scores_reference
from megaforge.kernels.cross_entropy.triton import TritonScores
from megaforge.kernels.native import triton_kernels

KERNELS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
FORM = TritonScores if KERNELS else PlainScores
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short rows take some."""
    if KERNELS:
        monkeypatch.setattr(triton_kernels("cross_entropy")[0], "WIDTH", 16)


def close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def check(logits: Tensor, target: Tensor, columns: int, tolerance: float = 3e-6) -> None:
    """Both ways of use, on one rank."""
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    weights = torch.linspace(-1, 2, len(logits), device=DEVICE)
    wide = logits.double()
    peak, total, picked = label_scores_reference(wide, target, columns)
    scores: Scores = FORM(logits.clone(), target, columns)
    close(scores.picked, picked, tolerance)
    largest = scores.peak
    close(largest, peak, tolerance)
    close(scores.sums(largest), total, tolerance)
    share = weights.double() / total
    expected = label_gradients_reference(wide, target, columns, peak, share, weights.double())
    rounding = 1e-2 if logits.dtype == torch.bfloat16 else tolerance
    close(scores.gradients_of_sum(total.float(), weights), expected, rounding)
    log_sums = peak + total.log()
    expected = label_gradients_reference(wide, target, columns, log_sums, weights.double(), weights.double())
    ours = FORM(logits.clone(), target, columns).gradients(log_sums.float(), weights)
    assert ours.dtype == logits.dtype
    close(ours, expected, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "columns"), [(5, 40, 37), (1, 16, 16), (3, 33, 33), (2, 3, 1), (0, 8, 8)])
def test_rows(rows: int, width: int, columns: int, dtype: torch.dtype) -> None:
    """Also labels that are held elsewhere: before, behind, and in the padding."""
    torch.manual_seed(width)
    target = torch.randint(0, columns, (rows,))
    target[1:4] = torch.tensor([-1, columns, width + 5])[: max(rows - 1, 0)]
    check(3 * torch.randn(rows, width).to(dtype), target, columns)


def test_hard_rows() -> None:
    """Alike, all zero, peaks in the first and in the last column, spread far apart, with columns of no chance."""
    logits = torch.randn(1, 35).repeat(6, 1)
    logits[1] = 0
    logits[2, 0], logits[3, -1] = 80.0, 80.0
    logits[4] *= 100
    logits[5, :20] = float("-inf")
    check(logits, torch.tensor([0, 5, 0, 34, 3, 30]), 35, 1e-5)


def test_a_rank_without_columns_and_one_with_them_make_the_whole() -> None:
    torch.manual_seed(1)
    logits, target = torch.randn(4, 40), torch.tensor([0, 10, 25, 30])
    parts = [(logits[:, :24], target, 24), (logits[:, 24:].contiguous(), target - 24, 10), (logits[:, :3], target, 0)]
    scores = [FORM(part.contiguous().to(DEVICE), at.to(DEVICE), columns) for part, at, columns in parts]
    peaks = torch.stack([one.peak for one in scores])
    peak, total, picked = (x.to(DEVICE) for x in label_scores_reference(logits.double(), target, 34))
    close(peaks.amax(0), peak, 1e-6)
    assert bool((peaks[2] == -float("inf")).all())
    close(sum(one.picked for one in scores), picked, 1e-6)  # type: ignore[arg-type]
    close(sum(one.sums(peak.float()) for one in scores), total, 3e-6)  # type: ignore[arg-type]
    weights = torch.ones(4, device=DEVICE)
    expected = label_gradients_reference(
        logits.double().to(DEVICE), target.to(DEVICE), 34, peak, 1 / total, weights.double()
    )
    found = torch.cat([one.gradients_of_sum(total.float(), weights) for one in scores[:2]], dim=1)
    close(found, expected, 3e-6)
    assert not scores[2].gradients_of_sum(total.float(), weights).any()


def test_a_nan_stays_in_its_row() -> None:
    logits = torch.randn(3, 40, device=DEVICE)
    logits[1, 20] = float("nan")
    scores = FORM(logits, torch.zeros(3, dtype=torch.int64, device=DEVICE), 40)
    total = scores.sums(scores.peak)
    assert total.isnan().tolist() == [False, True, False]
