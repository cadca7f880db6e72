"""WKV-7's compiled CPU code on every instruction set of this CPU, and as an operator of torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megaforge.kernels.native import why_missing
from megaforge.kernels.wkv7 import wkv7, wkv7_recurrent
from megaforge.kernels.wkv7.native import COMPILED
from tests.kernels.wkv7_cases import HARD, assert_as_good_as_the_definition, assert_close, make_inputs, run

pytestmark = pytest.mark.skipif("cpu" not in COMPILED, reason=f"not built: {why_missing('wkv7', 'cpu')}")
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", request.param)
    try:
        wkv7(*make_inputs(1, n=1))
        wkv7(*(x.float() for x in make_inputs(1, n=1)))
    except RuntimeError as error:
        if "lacks it" not in str(error):
            raise
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["decay", "minimum-decay"])
def long_case(request: pytest.FixtureRequest):
    """4,096 tokens: inputs, and what the recurrence makes of them."""
    inputs = [x.float().double() for x in make_inputs(4096, batch=1, heads=1, n=64, minimum_decay=request.param)]
    return inputs, run(wkv7_recurrent, inputs, None, torch.float64)


@pytest.fixture(scope="module", params=[False, True], ids=["decay", "minimum-decay"])
def cases(request: pytest.FixtureRequest):
    """Lengths, head sizes and resets, with what the recurrence makes of them."""
    found = []
    for number, s in enumerate(LENGTHS):
        n = (64, 16, 24, 64, 128, 64, 2, 64)[number]
        inputs = [x.float().double() for x in make_inputs(s, heads=2, n=n, minimum_decay=request.param, seed=s)]
        start = None
        if number % 2:
            start = torch.rand(s, 2, generator=torch.Generator().manual_seed(s)) < 0.1
            start[0, 0] = True
        found.append((inputs, start, run(wkv7_recurrent, inputs, start, torch.float64)))
    return found


def test_outputs_and_gradients_at_any_length_and_head_size(isa: str, cases) -> None:
    for inputs, start, expected in cases:
        assert_close(run(wkv7, inputs, start, torch.float32), expected, 5e-6)


def test_four_thousand_tokens(isa: str, long_case) -> None:
    inputs, expected = long_case
    assert_close(run(wkv7, inputs, None, torch.float32), expected, 5e-6)


def test_float64_is_exact(long_case) -> None:
    inputs, expected = long_case
    assert_close(run(wkv7, inputs, None, torch.float64), expected, 1e-12)


@pytest.mark.parametrize("n", [64, 20])
def test_bfloat16_rounds_once(isa: str, n: int) -> None:
    """As a layer calls it, everything in bfloat16 but the decay: results are exact up to their own rounding."""
    inputs = [x.bfloat16().double() for x in make_inputs(70, n=n)]
    inputs[1] = make_inputs(70, n=n)[1].float().double()
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    leaves = [x.bfloat16().requires_grad_() for x in inputs]
    leaves[1], leaves[6] = (inputs[i].float().requires_grad_() for i in (1, 6))
    y, state = wkv7(*leaves)
    generator = torch.Generator().manual_seed(99)
    dy, dstate = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, state))
    got = torch.autograd.grad([y, state], leaves, [dy.bfloat16(), dstate.float()])
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert [x.dtype for x in got] == [x.dtype for x in leaves]
    named = dict(zip(expected, (y, state, *got), strict=True))
    assert_close({name: x.detach().double() for name, x in named.items()}, expected, 4e-3)
    assert_close({"state": state.detach().double()}, {"state": expected["state"]}, 5e-6)
    nearest = expected["y"].bfloat16().double()
    assert ((y.double() - nearest).abs() <= 2**-7 * nearest.abs() + 1e-4).all(), "more than the last place is wrong"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)])
def test_hard_inputs_are_no_worse_than_in_the_recurrence(isa: str, dtype: torch.dtype, tolerance: float) -> None:
    for case in HARD.values():
        assert_as_good_as_the_definition(wkv7, case, 64, dtype, tolerance)


def test_decays_without_bound(isa: str) -> None:
    """Nothing is divided by a decay: one that forgets everything is no worse than another."""
    inputs = [x.float().double() for x in make_inputs(40, n=64)]
    inputs[1] = torch.full_like(inputs[1], -40.0)
    assert_close(run(wkv7, inputs, None, torch.float32), run(wkv7_recurrent, inputs, None, torch.float64), 5e-6)


@pytest.mark.parametrize("part", ["y", "state"])
def test_a_gradient_that_arrives_at_one_output_only(isa: str, part: str) -> None:
    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in make_inputs(33, n=64)]
        return torch.autograd.grad(function(*leaves)[part == "state"].square().sum(), leaves, allow_unused=True)

    for got, expected in zip(gradients(wkv7, torch.float32), gradients(wkv7_recurrent, torch.float64), strict=True):
        expected = torch.zeros_like(got).double() if expected is None else expected  # r, when only the state is used
        assert_close({part: got.double()}, {part: expected}, 2e-5)


def test_strided_inputs(isa: str) -> None:
    """Slices of a sequence, of fused projections, and channels that are not next to each other."""
    inputs = make_inputs(50, batch=2, heads=3, n=64)
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    fused = torch.cat([x.float() for x in inputs[:3]], -1).requires_grad_()
    leaves = [x.float().requires_grad_() for x in inputs[3:]]
    apart = leaves[0].detach().permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    y, state = wkv7(*fused.split(64, -1), apart, *leaves[1:])
    assert apart.stride(-1) != 1
    both = {"y": y.detach().double(), "state": state.detach().double()}
    assert_close(both, {name: expected[name] for name in both}, 5e-6)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    (got,) = torch.autograd.grad(y, fused, dy.float().transpose(0, 1).contiguous().transpose(0, 1))
    doubles = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(wkv7_recurrent(*doubles)[0], doubles[:3], dy)
    assert_close({"fused": got.double()}, {"fused": torch.cat(want, -1)}, 5e-6)


def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    inputs = make_inputs(40, batch=2, heads=3, n=64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(wkv7, inputs, None, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


def test_the_operators_are_well_formed() -> None:
    """Schema, fake tensors, autograd registration, symbolic shapes: torch's own check."""
    *six, state = [x.float().requires_grad_() for x in make_inputs(70)]
    start = torch.zeros(70, 2, dtype=torch.bool)
    start[9] = True
    forward = torch.ops.megaforge.wkv7.default
    torch.library.opcheck(forward, (*six, state, start, 64, True))
    torch.library.opcheck(forward, (*(x.detach().bfloat16() for x in six), None, None, 0, False))
    six = [x.detach() for x in six]
    _, _, states, removed = forward(*six, state.detach(), start, 64, True)
    for grads in ((torch.ones_like(six[0]), None), (torch.ones_like(six[0]), torch.ones_like(state).detach())):
        torch.library.opcheck(torch.ops.megaforge.wkv7_backward.default, (*six, start, states, removed, *grads, 64))


def test_recomputation_and_compilation_change_nothing() -> None:
    inputs = make_inputs(70)
    expected = run(wkv7, inputs, None, torch.float32)
    compiled = torch.compile(wkv7, fullgraph=True, backend="aot_eager")
    for function in (lambda *x: checkpoint(wkv7, *x, use_reentrant=False), compiled):
        got = run(function, inputs, None, torch.float32)
        assert all(torch.equal(got[name], x) for name, x in expected.items())


def test_nothing_is_saved_without_gradients() -> None:
    inputs = [x.float() for x in make_inputs(70)]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "wkv7" in str(func):
                seen.append(out)
            return out

    with Watch(), torch.no_grad():
        wkv7(*inputs)
    ((_, _, states, removed),) = seen
    assert states.numel() == 0 and removed.numel() == 0


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.float() for x in make_inputs(4)]
    with pytest.raises(RuntimeError, match="shapes differ"):
        wkv7(inputs[0][:2], *inputs[1:])
    with pytest.raises(RuntimeError, match="a state must be"):
        wkv7(*inputs[:6], inputs[6][:1])
    with pytest.raises(RuntimeError, match="document_start must be bool"):
        wkv7(*inputs, torch.zeros(4, 2))
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="MEGAFORGE_CPU_ISA=sse9: choose avx512, avx2 or scalar"):
        wkv7(*inputs)


def test_the_fallback_says_so_once() -> None:
    code = (
        "import torch; from megaforge.kernels.wkv7 import wkv7\n"
        "for s in (1, 5, 5): wkv7(*(torch.randn(s, 1, 1, 4) for _ in range(6)))\n"
    )
    env = {**os.environ, "MEGAFORGE_NATIVE": "0"}
    env.pop("RANK", None)
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stderr
    assert said.count("wkv7: no compiled code for cpu (MEGAFORGE_NATIVE=0); using plain torch") == 1
    silent = subprocess.run(
        [sys.executable, "-c", code], env={**env, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "wkv7" not in silent.stderr


def test_what_gpus_keep_is_in_the_type_of_the_inputs() -> None:
    """On the meta device, by which plans count it."""

    def kept(dtype: torch.dtype, r: torch.dtype, interval: int) -> tuple[int, torch.dtype]:
        log_w, *others = (torch.empty(130, 2, 3, 32, device="meta", dtype=one) for one in (torch.float32, *[dtype] * 4))
        first = torch.empty(130, 2, 3, 32, device="meta", dtype=r)
        states = torch.ops.megaforge.wkv7(first, log_w, *others, None, None, interval, False)[2]
        return len(states), states.dtype

    assert kept(torch.bfloat16, torch.bfloat16, 64) == (3, torch.bfloat16)
    assert kept(torch.bfloat16, torch.float32, 64) == kept(torch.float32, torch.float32, 64) == (3, torch.float32)
    assert kept(torch.bfloat16, torch.bfloat16, 16) == (9, torch.float32)
