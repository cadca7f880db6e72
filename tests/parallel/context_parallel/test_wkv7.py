"""WKV-7 over sequences that ranks share, on hard inputs: each rank's part against the whole recurrence in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.wkv7 import wkv7_recurrent, wkv7_torch
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.context_parallel.wkv7 import context_parallel_wkv7
from tests.kernels.wkv7_cases import HARD, NAMES, HardCase, relative_error
from tests.parallel.pool import RankPool

CASES = {name: case for name, case in HARD.items() if case.length > 1}
N = 16


def direction(case: HardCase) -> Tensor:
    return torch.randn(case.length, 2, 1, N, generator=torch.Generator().manual_seed(2))


def shared(cp: int, backend: str) -> list[list[Tensor]]:
    """y and six gradients of every case, whole, with zeros where other ranks hold the tokens."""
    ctx = ParallelContext.create(cp=cp)
    shards, results = ContextParallelShard(ctx.cp), []
    options = {"function": wkv7_torch} if backend == "torch" else {}
    for case in CASES.values():
        leaves = [x.float().requires_grad_() for x in case.inputs(N)[:6]]
        start = shards.take(case.document_start(), 0)
        y = context_parallel_wkv7(*(shards.take(x, 0) for x in leaves), start, shards, **options)
        grads = torch.autograd.grad(y, leaves, shards.take(direction(case), 0))
        place = shards.take(torch.arange(case.length), 0)
        results.append([torch.zeros(case.length, 2, 1, N).index_copy(0, place, y.detach()), *grads])
    return results


def by_definition(case: HardCase, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in case.inputs(N)[:6]]
    y = wkv7_recurrent(*leaves, None, case.document_start())[0]
    return [y.detach(), *torch.autograd.grad(y, leaves, direction(case).to(dtype))]


@pytest.mark.parametrize(("cp", "backend"), [(2, "auto"), (4, "torch")])
def test_hard_inputs_are_no_worse_than_in_the_recurrence(ranks: RankPool, cp: int, backend: str) -> None:
    parts = ranks.run(cp, shared, cp, backend)
    for number, (name, case) in enumerate(CASES.items()):
        exact, own = by_definition(case, torch.float64), by_definition(case, torch.float32)
        for what, value, rough, *mine in zip(
            ("y", *NAMES[:6]), exact, own, *(part[number] for part in parts), strict=True
        ):
            error, allowed = relative_error(sum(mine), value), max(5e-6, 3 * relative_error(rough, value))
            assert error <= allowed, f"{name}, {what}: relative error {error:.2e}, allowed {allowed:.2e}"
