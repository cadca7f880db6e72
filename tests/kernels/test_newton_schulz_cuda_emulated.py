"""The block programs of csrc/newton_schulz/cuda, compiled for the host, against the same products in float64.

What this cannot show is that tensor cores multiply as their manual says; tests/gpu/test_newton_schulz.py does.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megaforge.kernels.newton_schulz import cuda, newton_schulz, reference

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
FORMS = pytest.mark.parametrize("wgmma", [False, True], ids=["mma", "wgmma"])
TILE, DEPTH, THREADS, SUMS, BAND = 128, 64, 256, 64, 8
QUINTIC = (3.4445, -4.7750, 2.0315)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(__file__).with_name("newton_schulz_emulated.cpp")
    target = tmp_path_factory.mktemp("newton_schulz") / "emulated.so"
    assert COMPILER is not None
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def unwritten(*shape: int) -> Tensor:
    return torch.full(shape, math.nan, dtype=torch.bfloat16)


def product(
    library: ctypes.CDLL,
    left: Tensor,
    right: Tensor,
    add: Tensor | None = None,
    scales: tuple[float, float] = (1.0, 0.0),
    wgmma: bool = False,
    symmetric: bool = False,
    order: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor]:
    """The result and what is written as its transpose (all NaN for symmetric ones); order: threads reversed, copies
    made at once."""
    batch, rows, depth = left.shape
    columns = right.shape[1]
    out, mirror = unwritten(batch, rows, columns), unwritten(batch, columns, rows)
    shape = (ctypes.c_int * 4)(batch, rows, columns, depth)
    library.emulate_product(
        int(wgmma), *map(int, order), shape, address(left), address(right), address(add), address(out),
        address(None if symmetric else mirror), *map(ctypes.c_float, scales), int(symmetric),
    )  # fmt: skip
    return out, mirror


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """Each value is within one rounding to bf16 of ``exact``, and what sums in float32 lose."""
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5 * max(float(exact.abs().max()), 1e-30))


@FORMS
@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (2, 136, 264, 72), (1, 264, 8, 200), (1, 128, 128, 64)], ids=str)
def test_a_product_and_its_transpose(library: ctypes.CDLL, wgmma: bool, shape: tuple[int, int, int, int]) -> None:
    batch, rows, columns, depth = shape
    left, right, add = (
        random(batch, *sides, seed=seed)
        for seed, sides in enumerate([(rows, depth), (columns, depth), (rows, columns)])
    )
    out, mirror = product(library, left, right, add, (0.75, -1.5), wgmma)
    assert_rounded(out, 0.75 * (left.double() @ right.double().mT) - 1.5 * add.double())
    assert torch.equal(mirror, out.mT)


@FORMS
@pytest.mark.parametrize("rows", [8, 128, 136, 304])
def test_a_symmetric_product_is_whole_and_symmetric(library: ctypes.CDLL, wgmma: bool, rows: int) -> None:
    x, half = random(2, rows, 72), random(2, rows, rows, seed=1)
    add = half + half.mT
    out, _ = product(library, x, x, add, (2.0315, -4.775), wgmma, symmetric=True)
    assert_rounded(out, 2.0315 * (x.double() @ x.double().mT) - 4.775 * add.double())
    assert torch.equal(out, out.mT)


@FORMS
@pytest.mark.parametrize("depth", [8, 64, 72, 128, 192, 264])
def test_the_order_of_threads_and_copies_does_not_matter(library: ctypes.CDLL, wgmma: bool, depth: int) -> None:
    """A barrier, or a stage, too few would let a thread read what another has, or has not yet, written."""
    left, right = random(1, 16, depth), random(1, 24, depth, seed=1)
    first, *others = (
        product(library, left, right, wgmma=wgmma, order=order)[0]
        for order in [(False, False), (True, False), (False, True), (True, True)]
    )
    assert_rounded(first, left.double() @ right.double().mT)
    assert all(torch.equal(first, other) for other in others)


@FORMS
def test_a_broken_matrix_breaks_no_other(library: ctypes.CDLL, wgmma: bool) -> None:
    x = random(3, 24, 40)
    expected, _ = product(library, x, x, wgmma=wgmma, symmetric=True)
    x[1] = math.nan
    got, _ = product(library, x, x, wgmma=wgmma, symmetric=True)
    assert torch.equal(got[::2], expected[::2]) and got[1].isnan().all()
    assert not product(library, torch.zeros_like(x), torch.zeros_like(x), wgmma=wgmma)[0].any()


def steps_in_torch(x: Tensor, steps: list[tuple[float, float, float]]) -> Tensor:
    """The iteration with what the kernels round to bf16 rounded, and all else in float64."""
    for a, b, c in steps:
        exact = x.double()
        gram = (exact @ exact.mT).bfloat16().double()
        polynomial = (b * gram + c * (gram @ gram)).bfloat16().double()
        x = (a * exact + polynomial @ exact).bfloat16()
    return x


@FORMS
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "steps", [[QUINTIC] * 5, [(1.5, -0.5, 0.0), QUINTIC], [QUINTIC]], ids=["five", "without the square", "one"]
)
def test_steps_of_the_iteration(
    library: ctypes.CDLL, wgmma: bool, transposed: bool, steps: list[tuple[float, float, float]]
) -> None:
    batch, m, n = 2, 40, 136
    x = torch.nn.functional.normalize(random(batch, m, n).double().flatten(1), dim=1).view(batch, m, n).bfloat16()
    turned, out = x.mT.contiguous(), unwritten(batch, *((n, m) if transposed else (m, n)))
    shape, flat = (ctypes.c_int * 3)(batch, m, n), [value for step in steps for value in step]
    library.emulate_steps(
        int(wgmma), shape, address(x), address(turned), (ctypes.c_float * len(flat))(*flat), len(steps),
        int(transposed), address(out),
    )  # fmt: skip
    expected = steps_in_torch(x, steps).double()
    error = (out.mT if transposed else out).double() - expected
    assert error.norm() <= 1e-2 * expected.norm()  # five steps carry single roundings on


def tiles(library: ctypes.CDLL, rows: int, columns: int, first: int, count: int) -> list[tuple[int, int]]:
    """``count`` tiles from the one of index ``first`` on; columns 0: the lower ones of rows x rows."""
    places = np.full((count, 2), -1, np.int32)
    library.enumerate_tiles(rows, columns, first, count, places.ctypes.data_as(ctypes.c_void_p))
    found = [(int(row), int(column)) for row, column in places]
    in_bands = [(row // BAND, column, row) for row, column in found]
    assert in_bands == sorted(set(in_bands)), "neighbours share a band of rows and its columns"
    return found


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 23, 64])
def test_every_lower_tile_is_computed_once(library: ctypes.CDLL, rows: int) -> None:
    found = tiles(library, rows, 0, 0, rows * (rows + 1) // 2)
    assert set(found) == {(i, j) for i in range(rows) for j in range(i + 1)}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 3), (9, 5), (3, 20), (31, 2)])
def test_every_tile_is_computed_once(library: ctypes.CDLL, rows: int, columns: int) -> None:
    found = tiles(library, rows, columns, 0, rows * columns)
    assert set(found) == {(i, j) for i in range(rows) for j in range(columns)}


def test_tiles_where_float32_no_longer_holds_the_index(library: ctypes.CDLL) -> None:
    rows = 2**20 // TILE - 3
    band = rows // BAND * BAND
    first, last = band * (band + 1) // 2 - 1, rows * (rows + 1) // 2 - 1
    found = tiles(library, rows, 0, first, last - first + 1)
    assert found[:2] == [(band - 1, band - 1), (band, 0)] and found[-1] == (rows - 1, rows - 1)


def test_fragments_are_the_ones_that_the_tensor_cores_take(library: ctypes.CDLL) -> None:
    """What ldmatrix brings to the lanes, joined as the PTX manual joins it, is the tile's product."""
    a, b = random(TILE, DEPTH), random(TILE, DEPTH, seed=1)
    c = torch.full((TILE, TILE), math.nan)
    library.multiply_by_lanes(address(a), address(b), address(c))
    torch.testing.assert_close(c.double(), a.double() @ b.double().mT, rtol=0, atol=1e-4)


@FORMS
def test_the_threads_hold_each_sum_once(library: ctypes.CDLL, wgmma: bool) -> None:
    places = np.full((THREADS, SUMS, 2), -1, np.int32)
    library.sum_places(int(wgmma), places.ctypes.data_as(ctypes.c_void_p))
    assert {tuple(place) for place in places.reshape(-1, 2).tolist()} == {
        (i, j) for i in range(TILE) for j in range(TILE)
    }
    assert (places[:, 0::2, 0] == places[:, 1::2, 0]).all() and (places[:, 0::2, 1] + 1 == places[:, 1::2, 1]).all()
    if wgmma:  # D of wgmma.m64nNk16, which a warp group holds
        thread, i = np.arange(THREADS)[:, None], np.arange(SUMS)[None, :]
        assert (
            places[..., 0] == 64 * (thread // 128) + 16 * (thread // 32 % 4) + thread % 32 // 4 + 8 * (i // 2 % 2)
        ).all()
        assert (places[..., 1] == 8 * (i // 4) + 2 * (thread % 4) + i % 2).all()


def test_the_descriptor_is_that_of_the_ptx_manual(library: ctypes.CDLL) -> None:
    library.descriptor_at.restype = ctypes.c_uint64
    found = library.descriptor_at(ctypes.c_uint(0x2_3460))
    assert found & 0x3FFF == 0x2346 and found >> 32 & 0x3FFF == 64  # start and stride, in 16 bytes
    assert found >> 49 & 7 == 0 and found >> 62 == 1  # no offset; swizzle of 128 bytes
    assert found == 0x2346 | 1 << 16 | 64 << 32 | 1 << 62


def test_the_operator_has_the_shape_of_its_input() -> None:
    x = torch.empty(2, 64, 136, dtype=torch.bfloat16, device="meta")
    result = torch.ops.megaforge.newton_schulz_steps(x, [1.0, 2.0, 3.0], False)
    assert result.shape == x.shape and result.dtype == x.dtype


def test_cpus_are_not_its_business() -> None:
    assert not cuda.takes(torch.empty(1, 128, 128, dtype=torch.bfloat16)) and not cuda.has_wgmma(torch.device("cpu"))


@pytest.mark.parametrize("shape", [(64, 136), (136, 64), (2, 64, 64)], ids=str)
def test_the_face_hands_it_bf16_and_the_steps(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    handed: list[Tensor] = []

    def steps(x: Tensor, triples: tuple[tuple[float, float, float], ...]) -> Tensor:
        handed.append(x)
        return reference.standard(x, triples)

    x = random(*shape).float()
    with monkeypatch.context() as without:
        without.setattr(cuda, "on_gpu", lambda x: True)
        without.setattr(cuda, "takes", lambda x: False)
        expected = newton_schulz(x, algorithm="standard")
    monkeypatch.setattr(cuda, "on_gpu", lambda x: True)
    monkeypatch.setattr(cuda, "takes", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(cuda, "steps_by_cuda", steps)
    assert torch.equal(newton_schulz(x, algorithm="standard"), expected)
    assert len(handed) == 1 and handed[0].dim() == 3 and handed[0].shape[1] <= handed[0].shape[2]
    newton_schulz(x, precision="fp32"), newton_schulz(x.double()), newton_schulz(x, precision="split")
    assert len(handed) == 1
