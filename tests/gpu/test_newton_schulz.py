"""Newton-Schulz on a GPU: compiled code with mma.sync and wgmma, and what cuBLAS does, against float64 on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaforge.kernels.newton_schulz import newton_schulz
from megaforge.kernels.newton_schulz.cuda import COMPILED, has_wgmma, steps_by_cuda, takes
from tests.kernels.test_newton_schulz_cuda_emulated import QUINTIC, steps_in_torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiled = pytest.mark.skipif("cuda" not in COMPILED, reason="megaforge.kernels._newton_schulz_cuda is not built")
GPU = torch.device("cuda")
STEPS = [QUINTIC] * 5


@pytest.fixture(params=[False, True], ids=["mma", "wgmma"])
def wgmma(request: pytest.FixtureRequest) -> bool:
    if request.param and not has_wgmma(torch.device("cuda", 0)):
        pytest.skip("no wgmma: another GPU than sm_90, or a build without 9.0a")
    return bool(request.param)


def normalised(*shape: int, decay: float = 0.0, seed: int = 0) -> Tensor:
    """bf16 matrices of Frobenius norm 1; ``decay`` > 0: row k is k^-decay as large."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.arange(1, shape[1] + 1, dtype=torch.float64).pow(-decay)[:, None]
    return (x / x.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]).bfloat16()


def exact(x: Tensor) -> Tensor:
    y = x.double().mT if x.shape[1] > x.shape[2] else x.double()
    for a, b, c in STEPS:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if x.shape[1] > x.shape[2] else y


def by_cublas(x: Tensor) -> Tensor:
    """As torch.optim.Muon rounds."""
    y = x.mT if x.shape[1] > x.shape[2] else x
    for a, b, c in STEPS:
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if x.shape[1] > x.shape[2] else y


@compiled
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 136, 264), (2, 264, 136), (1, 304, 72), (3, 128, 128)], ids=str)
def test_one_step_is_the_products_rounded_to_bf16(wgmma: bool, shape: tuple[int, int, int]) -> None:
    x = normalised(*shape)
    wide = x.mT if shape[1] > shape[2] else x
    expected = steps_in_torch(wide, [QUINTIC]).double()
    got = steps_by_cuda(x.cuda(), [QUINTIC], wgmma).cpu()
    error = (got.mT if shape[1] > shape[2] else got).double() - expected
    assert error.norm() <= 2e-3 * expected.norm()
    assert error.abs().max() <= 0.02 * expected.abs().max()


@compiled
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(1, 512, 512), (4, 256, 576), (1, 1024, 256), (1, 520, 1096)], ids=str)
def test_the_error_is_no_worse_than_cublas(wgmma: bool, shape: tuple[int, int, int], decay: float) -> None:
    x = normalised(*shape, decay=decay)
    expected = exact(x)
    ours, theirs = steps_by_cuda(x.cuda(), STEPS, wgmma), by_cublas(x.cuda())
    assert (ours.cpu().double() - expected).norm() <= 1.1 * (theirs.cpu().double() - expected).norm()


@compiled
def test_a_batch_is_its_matrices_and_the_same_bits_every_time(wgmma: bool) -> None:
    x = normalised(5, 200, 328).cuda()
    whole = steps_by_cuda(x, STEPS, wgmma)
    assert torch.equal(whole, steps_by_cuda(x, STEPS, wgmma))
    assert torch.equal(whole, torch.cat([steps_by_cuda(one, STEPS, wgmma) for one in x.split(1)]))


@compiled
def test_broken_and_zero_matrices(wgmma: bool) -> None:
    x = normalised(4, 128, 192).cuda()
    expected = steps_by_cuda(x, STEPS, wgmma)
    x[1, 5, 7] = math.nan
    x[2] = 0
    got = steps_by_cuda(x, STEPS, wgmma)
    assert torch.equal(got[::3], expected[::3]) and got[1].isnan().any() and not got[2].any()


@compiled
def test_views_and_empty_batches(wgmma: bool) -> None:
    x = normalised(2, 128, 264).cuda()
    expected = steps_by_cuda(x, STEPS, wgmma)
    shifted = torch.cat([x.flatten(), x.new_zeros(1)]).roll(1)[1:].view_as(x)
    assert shifted.data_ptr() % 16 != 0
    assert torch.equal(steps_by_cuda(shifted, STEPS, wgmma), expected)
    assert torch.equal(steps_by_cuda(x.mT, STEPS, wgmma), expected.mT)
    assert steps_by_cuda(x[:0], STEPS, wgmma).shape == (0, 128, 264)


@compiled
def test_many_tiles_in_bands(wgmma: bool) -> None:
    """More rows of tiles than a band has, the last one cut."""
    x = normalised(1, 1160, 1304).cuda()
    got, expected = steps_by_cuda(x, [QUINTIC], wgmma).double(), by_one_step(x.double())
    assert (got - expected).norm() <= 6e-3 * expected.norm()


def by_one_step(x: Tensor) -> Tensor:
    a, b, c = QUINTIC
    gram = x @ x.mT
    return a * x + (b * gram + c * (gram @ gram)) @ x


@compiled
def test_the_operator_keeps_torchs_rules() -> None:
    torch.library.opcheck(
        torch.ops.megaforge.newton_schulz_steps.default, (normalised(2, 64, 72).cuda(), [3.4, -4.7, 2.0], False)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(256, 640), (640, 256), (3, 128, 128), (100, 30), (1, 50), (50, 1), (2, 0, 8)], ids=str
)
def test_the_face_on_a_gpu_is_the_face_on_a_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    expected, got = newton_schulz(x), newton_schulz(x.cuda())
    assert got.dtype == dtype and got.shape == x.shape and got.device.type == "cuda"
    tolerance = 1e-10 if dtype == torch.float64 else 3e-2
    assert (got.cpu().double() - expected.double()).norm() <= tolerance * expected.double().norm() + 1e-12


@compiled
def test_which_matrices_it_takes() -> None:
    for shape in ((2, 64, 72), (1, 4096, 64)):
        assert takes(torch.empty(shape, device=GPU, dtype=torch.bfloat16)) and not takes(torch.empty(shape, device=GPU))
    for shape in ((1, 63, 72), (1, 64, 73), (1, 8, 4096)):
        assert not takes(torch.empty(shape, device=GPU, dtype=torch.bfloat16))


def test_huge_and_tiny_scales_on_a_gpu() -> None:
    x = torch.randn(2, 128, 256, device=GPU)
    expected = newton_schulz(x)
    for scale in (1e30, 1e-30):
        assert (newton_schulz(scale * x, eps=1e-37) - expected).norm() <= 2e-2 * expected.norm()
