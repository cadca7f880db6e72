"""The block programs of csrc/wkv7/cuda, compiled for the host, against the float64 recurrence.

What this cannot show is that the GPU's tensor cores multiply as their manual says; tests/gpu/test_wkv7.py does.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megaforge.kernels.wkv7 import wkv7_recurrent
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

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CHUNK, FEW = 16, 64  # tokens of a chunk, and from one kept state to the next


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(__file__).with_name("wkv7_emulated.cpp")
    target = tmp_path_factory.mktemp("wkv7") / "emulated.so"
    assert COMPILER is not None
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def address(x: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def addresses(*tensors: torch.Tensor) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def emulated(
    library: ctypes.CDLL, reversed_threads: bool = False, tokens_per_state: int = FEW
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """WKV-7 by the emulated blocks, with the arguments of ``wkv7``."""

    class Emulated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, r, log_w, k, v, a, b, initial_state, document_start):
            inputs = [r, log_w.float(), k, v, a, b]
            s, batch, heads, n = r.shape
            bf16 = int(r.dtype == torch.bfloat16)
            shape = (ctypes.c_int * 4)(s, batch, heads, n)
            strides = (ctypes.c_int64 * 18)(*(step for x in inputs for step in x.stride()[:3]))
            starts = None if document_start is None else document_start.to(torch.uint8).contiguous()
            # What is not written shows as NaN.
            y = torch.full_like(r, math.nan, memory_format=torch.contiguous_format)
            kept = torch.bfloat16 if bf16 and tokens_per_state == FEW else torch.float32
            states = torch.full((-(-s // tokens_per_state), batch, heads, n, n), math.nan, dtype=kept)
            final = torch.full((batch, heads, n, n), math.nan)
            state = None if initial_state is None else initial_state.float().contiguous()
            library.emulate_forward(
                bf16, int(reversed_threads), tokens_per_state, shape, addresses(*inputs), strides, address(starts),
                address(state),
                address(y), address(states), address(final),
            )  # fmt: skip
            ctx.save_for_backward(*inputs, states, starts)
            return y, final

        @staticmethod
        def backward(ctx, dy, dfinal):
            *inputs, states, starts = ctx.saved_tensors
            shape = (ctypes.c_int * 4)(*inputs[0].shape)
            bf16 = int(dy.dtype == torch.bfloat16)
            inputs.append(dy)
            strides = (ctypes.c_int64 * 21)(*(step for x in inputs for step in x.stride()[:3]))
            grads = [torch.full(x.shape, math.nan, dtype=x.dtype) for x in inputs[:6]]
            dinitial = torch.full_like(dfinal, math.nan)
            between = torch.full((*dfinal.shape[:2], FEW // CHUNK - 2, *dfinal.shape[2:]), math.nan)
            library.emulate_backward(
                bf16, int(reversed_threads), tokens_per_state, shape, addresses(*inputs), strides, address(starts),
                address(states), address(between), address(dfinal.contiguous()), addresses(*grads), address(dinitial),
            )  # fmt: skip
            return *grads, dinitial, None

    return Emulated.apply


@pytest.mark.parametrize("minimum_decay", [False, True])
@pytest.mark.parametrize("s", [1, 16, 17, 65, 100])  # the last group of four chunks has 1, 1, 2, 1 and 3
def test_fp32_matches_the_recurrence_with_all_gradients(library: ctypes.CDLL, s: int, minimum_decay: bool) -> None:
    inputs = rounded(make_inputs(s, n=64, heads=1, minimum_decay=minimum_decay, seed=s), torch.float32)
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    assert_close(run(emulated(library), inputs, None, torch.float32), expected, 5e-6)


@pytest.mark.parametrize("minimum_decay", [False, True])
@pytest.mark.parametrize("s", [17, 150])
def test_bf16_matches_the_recurrence_within_its_rounding(library: ctypes.CDLL, s: int, minimum_decay: bool) -> None:
    inputs = rounded(make_inputs(s, n=64, heads=1, minimum_decay=minimum_decay, seed=s), torch.bfloat16)
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    assert_close(run_as(emulated(library), inputs, None, torch.bfloat16), expected, 4e-3)


@hard
@pytest.mark.parametrize(("dtype", "tolerance", "times"), [(torch.float32, 5e-6, 3), (torch.bfloat16, 4e-3, 6)])
def test_hard_inputs_are_no_worse_than_in_the_recurrence(
    library: ctypes.CDLL, case: HardCase, dtype: torch.dtype, tolerance: float, times: float
) -> None:
    """In bf16 the state is multiplied in TF32, so what a run of one token removes from a large one is less exact."""
    assert_as_good_as_the_definition(emulated(library), case, 32, dtype, tolerance, times)


@pytest.mark.parametrize("starts", [[0], [5, 16], [31, 32, 33], [1, 2, 3, 40, 59], list(range(45))])
def test_resets_anywhere_match_the_recurrence(library: ctypes.CDLL, starts: list[int]) -> None:
    inputs = rounded(make_inputs(60, n=32, heads=1), torch.float32)
    document_start = torch.zeros(60, 2, dtype=torch.bool)
    document_start[starts, 0] = True
    document_start[[37, 48], 1] = True
    expected = run(wkv7_recurrent, inputs, document_start, torch.float64)
    assert_close(run(emulated(library), inputs, document_start, torch.float32), expected, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_are_computed_again_are_those_that_were_not_kept(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """In fp32 to the bit, but for a sum that the other plan of the block takes in other parts; in bf16 within the
    rounding of the states that are kept."""
    inputs = rounded(make_inputs(150, n=32, heads=1), dtype)
    document_start = torch.zeros(150, 2, dtype=torch.bool)
    document_start[[20, 64, 90, 145], 1] = True
    few, many = (run_as(emulated(library, tokens_per_state=n), inputs, document_start, dtype) for n in (FEW, CHUNK))
    for name, value in many.items():
        if name in ("y", "state") or (dtype == torch.float32 and name != "dlog_w"):
            assert torch.equal(few[name], value), name
    assert_close(few, many, 1e-6 if dtype == torch.float32 else 4e-3)


def test_strided_inputs_of_several_heads(library: ctypes.CDLL) -> None:
    """All six as views of one projection, and heads before the batch in memory."""
    inputs = rounded(make_inputs(20, n=32, heads=3), torch.float32)
    expected = run(wkv7_recurrent, inputs, None, torch.float64)

    def strided(*args):
        wide = torch.stack(args[:6], dim=1).permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)
        return emulated(library)(*wide.unbind(1), *args[6:])

    assert_close(run(strided, inputs, None, torch.float32), expected, 5e-6)


def test_far_below_the_minimum_decay_nothing_overflows(library: ctypes.CDLL) -> None:
    inputs = rounded(make_inputs(40, n=32, heads=1), torch.float32)
    inputs[1] = torch.full_like(inputs[1], -2.0)
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    assert_close(run(emulated(library), inputs, None, torch.float32), expected, 5e-6)


@pytest.mark.parametrize("n", [32, 64])
def test_the_order_of_threads_between_barriers_does_not_matter(library: ctypes.CDLL, n: int) -> None:
    """A barrier too few would let a thread read what another has, or has not yet, written."""
    inputs = rounded(make_inputs(40, n=n, heads=1), torch.bfloat16)
    document_start = torch.zeros(40, 2, dtype=torch.bool)
    document_start[[9, 21], 1] = True
    forward = run_as(emulated(library), inputs, document_start, torch.bfloat16)
    backward = run_as(emulated(library, reversed_threads=True), inputs, document_start, torch.bfloat16)
    for name, value in forward.items():
        assert torch.equal(value, backward[name]), name


def test_fragments_are_the_ones_that_the_tensor_cores_take(library: ctypes.CDLL) -> None:
    """The lanes' fragments, joined as the PTX manual joins them, are the product that the host's twin computes."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape, dtype=np.float32) for shape in ((16, 8), (8, 8)))
    by_lanes, by_twin = np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
    library.fragment_products(*(x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, by_lanes, by_twin)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(by_lanes, exact, atol=2e-6)
    np.testing.assert_allclose(by_twin, exact, atol=2e-6)
