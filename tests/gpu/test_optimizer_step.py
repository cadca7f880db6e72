"""Norms and clips of many gradients at once on a GPU, against the host's."""

from __future__ import annotations

import pytest
import torch

from megaforge.optim.clip import sum_of_squares

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_norm_of_many_gradients_takes_few_launches_and_loses_nothing() -> None:
    gradients = [torch.full((n,), 1e-3 * n, device="cuda") for n in (0, *range(1, 300), 1 << 22, 0)]
    expected = sum(float(g.cpu().double().square().sum()) for g in gradients)
    assert float(sum_of_squares(gradients)) == pytest.approx(expected, rel=1e-12)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sum_of_squares(gradients)
        torch.cuda.synchronize()
    assert len([event for event in profile.events() if "memcpy" not in event.name.lower()]) < 60
