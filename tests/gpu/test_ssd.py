"""Mamba-2's recurrence on a GPU, by mamba-ssm and in plain torch, against the float64 definition on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megaforge.kernels.ssd import ssd_recurrent
from megaforge.kernels.ssd.backend import ssd_backend
from tests.kernels.test_ssd import starts_at
from tests.nn.support import random

GPU = torch.device("cuda")
LENGTH, HEADS, GROUPS, WIDTH, STATES = 300, 4, 2, 64, 128
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
with_kernels = pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs the extra mamba")


@pytest.mark.parametrize("later", [False, True], ids=["state first", "state later"])
@pytest.mark.parametrize(
    "name,dtype,tolerance",
    [
        ("torch", torch.float32, 1e-5),
        pytest.param("mamba-ssm", torch.float32, 5e-3, marks=with_kernels),
        pytest.param("auto", torch.bfloat16, 2e-2, marks=with_kernels),
    ],
)
def test_the_recurrence_and_its_gradients(name: str, dtype: torch.dtype, tolerance: float, later: bool) -> None:
    starts = starts_at(LENGTH, (0, 1), (130, 0), (131, 0), (256, 1))
    groups = (LENGTH, 2, GROUPS, STATES)
    shapes = [(LENGTH, 2, HEADS, WIDTH), (LENGTH, 2, HEADS), (HEADS,), groups, groups, (HEADS,)]
    x, step, a, b, c, skip, state = (
        random(*shape, seed=seed) for seed, shape in enumerate([*shapes, (2, HEADS, WIDTH, STATES)])
    )
    given = [x, step.abs() / 10, -a.abs(), b, c, skip, state]
    results = []
    for there in (True, False):
        inputs = [(each.float().to(GPU) if there else each).detach().requires_grad_() for each in given]
        if there:
            piece = ssd_backend(name, GPU, dtype)(*inputs[:6], starts.to(GPU))
            if later:
                piece.summary()
            y, final = piece.output(inputs[6])
        else:
            y, final = ssd_recurrent(*inputs, starts)
        loss = (y * random(*y.shape, seed=50).to(y)).sum() + (final * random(*final.shape, seed=51).to(final)).sum()
        results.append([each.detach().cpu().double() for each in (y, final, *torch.autograd.grad(loss, inputs))])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())
