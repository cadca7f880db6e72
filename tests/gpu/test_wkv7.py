"""WKV-7 on a GPU, every implementation that is there, against the float64 recurrence on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from megaforge.kernels.wkv7 import wkv7, wkv7_recurrent
from megaforge.kernels.wkv7.backend import wkv7_backend
from megaforge.kernels.wkv7.native import COMPILED
from tests.kernels.wkv7_cases import (
    HardCase,
    assert_as_good_as_the_definition,
    assert_close,
    hard,
    make_inputs,
    rounded,
    run,
    run_as,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiled = pytest.mark.skipif("cuda" not in COMPILED, reason="megaforge.kernels._wkv7_cuda is not built")
with_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None, reason="needs the extra gpu"
)
GPU = torch.device("cuda")


def on_gpu(name: str, dtype: torch.dtype, n: int = 64) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The implementation called ``name``, from and to the CPU."""
    function = wkv7_backend(name, GPU, dtype, n)

    def run_there(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = function(*(None if x is None else x.to(GPU) for x in inputs))
        return y.cpu(), state.cpu()

    return run_there


def some_starts(s: int) -> torch.Tensor:
    starts = torch.zeros(s, 2, dtype=torch.bool)
    starts[[i for i in (0, 5, 16, 31, 32, 33, 99) if i < s], 0] = True
    starts[s // 2, 1] = True
    return starts


@compiled
@pytest.mark.parametrize("n", [32, 64])
@pytest.mark.parametrize("minimum_decay", [False, True])
@pytest.mark.parametrize("s", [1, 15, 16, 17, 100, 4096])
def test_fp32_matches_the_recurrence_with_all_gradients(s: int, minimum_decay: bool, n: int) -> None:
    inputs = rounded(make_inputs(s, heads=1, n=n, minimum_decay=minimum_decay, seed=s), torch.float32)
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    assert_close(run(on_gpu("native", torch.float32, n), inputs, None, torch.float32), expected, 5e-6)


@compiled
@pytest.mark.parametrize("n", [32, 64])
@pytest.mark.parametrize("minimum_decay", [False, True])
@pytest.mark.parametrize("s", [17, 100, 4096])
def test_bf16_matches_the_recurrence_within_its_rounding(s: int, minimum_decay: bool, n: int) -> None:
    inputs = rounded(make_inputs(s, heads=1, n=n, minimum_decay=minimum_decay, seed=s), torch.bfloat16)
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    assert_close(run_as(on_gpu("native", torch.bfloat16, n), inputs, None, torch.bfloat16), expected, 4e-3)


@compiled
@pytest.mark.parametrize("s", [40, 130])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)])
def test_resets_anywhere_match_the_recurrence(s: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs, starts = rounded(make_inputs(s, n=64), dtype), some_starts(s)
    expected = run(wkv7_recurrent, inputs, starts, torch.float64)
    assert_close(run_as(on_gpu("native", dtype), inputs, starts, dtype), expected, tolerance)


@compiled
@hard
@pytest.mark.parametrize(("dtype", "tolerance", "times"), [(torch.float32, 5e-6, 3), (torch.bfloat16, 4e-3, 6)])
def test_hard_inputs_are_no_worse_than_in_the_recurrence(
    case: HardCase, dtype: torch.dtype, tolerance: float, times: float
) -> None:
    assert_as_good_as_the_definition(on_gpu("native", dtype), case, 64, dtype, tolerance, times)


@hard
def test_hard_inputs_in_plain_torch(case: HardCase) -> None:
    assert_as_good_as_the_definition(on_gpu("torch", torch.float32, 16), case, 16, torch.float32, 5e-6)


@compiled
def test_views_of_one_projection_and_unaligned_rows() -> None:
    inputs = [x.float().cuda() for x in make_inputs(40, n=64)]
    y, state = wkv7(*inputs)
    wide = torch.stack(inputs[:6], dim=3).flatten(-2)
    for views in (wide.split(64, -1), [torch.cat([x[..., :1], x], -1)[..., 1:] for x in inputs[:6]]):
        assert not views[0].is_contiguous()
        y_views, state_views = wkv7(*views, inputs[6])
        assert torch.equal(y, y_views) and torch.equal(state, state_views)


@compiled
def test_the_same_bits_every_time() -> None:
    inputs = rounded(make_inputs(300, n=64), torch.bfloat16)
    first, second = (run_as(on_gpu("native", torch.bfloat16), inputs, None, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_torchs_rules(dtype: torch.dtype) -> None:
    inputs = [x.to(GPU, dtype).requires_grad_() for x in make_inputs(20, n=32)[:6]]
    state = torch.randn(2, 3, 32, 32, device=GPU, requires_grad=True)
    starts = some_starts(20).to(GPU)
    for interval in (16, 64):
        torch.library.opcheck(torch.ops.megaforge.wkv7.default, (*inputs, state, starts, interval, False))


@compiled
@pytest.mark.parametrize("n", [32, 64])
def test_states_that_are_computed_again_are_those_that_were_not_kept(n: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        inputs, starts = rounded(make_inputs(150, n=n), dtype), some_starts(150)
        few, many = (run_as(on_gpu(name, dtype, n), inputs, starts, dtype) for name in ("native", "native16"))
        assert_close(few, many, tolerance)


@compiled
def test_under_compile() -> None:
    inputs = [x.float().cuda().requires_grad_() for x in make_inputs(40, n=64)]

    def loss(*x: torch.Tensor) -> torch.Tensor:
        y, state = wkv7(*x)
        return y.square().sum() + state.sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_take_is_computed_by_torch() -> None:
    inputs = make_inputs(40, n=16)
    expected = run(wkv7_recurrent, inputs, some_starts(40), torch.float64)
    assert_close(run(on_gpu("auto", torch.float64, 16), inputs, some_starts(40), torch.float64), expected, 1e-12)


@with_fla
@pytest.mark.parametrize("resets", [False, True])
def test_fla_agrees_within_bf16(resets: bool) -> None:
    inputs, starts = rounded(make_inputs(130, n=64), torch.bfloat16), some_starts(130) if resets else None
    expected = run(wkv7_recurrent, inputs, starts, torch.float64)
    assert_close(run_as(on_gpu("fla", torch.bfloat16), inputs, starts, torch.bfloat16), expected, 2e-2)
