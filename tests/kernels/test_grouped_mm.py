"""The experts' products, in one call or in a loop, against one product an expert in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megaforge.config.model_config import ModelConfig
from megaforge.kernels import grouped_mm, native
from megaforge.kernels.grouped_mm import FEW_ROWS, FEWEST_ROWS, make_runs, takes_grouped_mm
from megaforge.kernels.grouped_mm.reference import grouped_linear_reference
from megaforge.nn.moe import MoEFFN
from megaforge.parallel.linear_op import PLAIN
from tests.nn.support import layer_context

COUNTS = {
    "even": (4, 4, 4),
    "idle ends": (0, 5, 0),
    "all but one idle": (0, 0, 9),
    "one row": (0, 1, 0),
    "none at all": (0, 0, 0),
}
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-13}


def run(x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = PLAIN.apply(x, weight, runs=make_runs(counts, x.device))
    return [out, *torch.autograd.grad(out, (x, weight), direction(out, x.dtype))]


def expected(x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    """The same in fp64, by the definition."""
    wide = x.double().requires_grad_(), weight.double().requires_grad_()
    out = grouped_linear_reference(*wide, counts)
    grad = direction(out, x.dtype).double()
    return [out.detach(), *torch.autograd.grad(out, wide, grad, allow_unused=True)]


def direction(out: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("width", "inner"), [(16, 8), (5, 7)])
def test_against_one_product_an_expert(dtype: torch.dtype, counts: tuple[int, ...], width: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(3, inner, width, generator=generator, dtype=torch.float64).to(dtype)
    assert takes_grouped_mm(x, weight) == (dtype != torch.float64 and width == 16 and bool(sum(counts)))
    for ours, theirs in zip(run(x, weight, counts), expected(x, weight, counts), strict=True):
        assert theirs is not None and ours.dtype == dtype
        scale = float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCES[dtype] * max(scale, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loop_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 32, generator=generator).to(dtype)
    weight = torch.randn(4, 24, 32, generator=generator).to(dtype)
    counts = (11, 0, 7, 12)
    grouped = run(x, weight, counts)
    monkeypatch.setattr(grouped_mm, "_GROUPED", None)
    assert not takes_grouped_mm(x, weight)
    for ours, theirs in zip(grouped, run(x, weight, counts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


MANY = {
    "like": (170, 169, 171, 170),
    "the last is short": (300, 250, 97, 33),
    "the last is empty": (400, 280, 0, 0),
    "one has all": (0, 0, 0, 680),
    "the first are empty": (0, 1, 0, 679),
    "one behind": (340, 0, 339, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", MANY.values(), ids=MANY.keys())
def test_rows_of_others_that_are_multiplied_too_change_nothing(
    dtype: torch.dtype, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where oneDNN compiles shapes; even where those rows are not numbers."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(counts), 24, generator=generator).to(dtype)
    weight = torch.randn(4, 16, 24, generator=generator).to(dtype)
    assert grouped_mm.compiles_shapes(x) and not takes_grouped_mm(x, weight)
    got = run(x, weight, counts)
    for ours, theirs in zip(got, expected(x, weight, counts), strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCES[dtype] * max(scale, 1.0))
    broken = max(range(4), key=counts.__getitem__)
    rows = list(make_runs(counts, x.device).parts())
    x[rows[broken]] = torch.nan
    out, rows_gradient, weight_gradient = run(x, weight, counts)
    for expert in range(4):
        if expert != broken:
            assert torch.equal(out[rows[expert]], got[0][rows[expert]])
            assert torch.equal(weight_gradient[expert], got[2][expert])
    assert torch.equal(rows_gradient, got[1])


def test_products_of_many_steps_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN compiles each of them once, and keeps 1,024."""
    met, mm = set[tuple[int, ...]](), torch.mm

    def noted(a: Tensor, b: Tensor, **into: Tensor) -> Tensor:
        met.add((*a.shape, b.shape[1]))
        return mm(a, b, **into)

    monkeypatch.setattr(torch, "mm", noted)
    x, weight = torch.zeros(512, 8, dtype=torch.bfloat16), torch.zeros(2, 16, 8, dtype=torch.bfloat16)
    for first in range(130, 383):
        run(x, weight, (first, 512 - first))
    assert len(met) <= 3 * 3 * 16, "three products, whose numbers of rows lie in less than two octaves"
    for rows in range(1, 5000):
        assert rows <= grouped_mm._padded(rows) < rows * 17 / 16
    assert grouped_mm._padded(0) == 0


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    weight = torch.empty(8, 16, 32)
    assert takes_grouped_mm(torch.empty(8 * FEW_ROWS, 32), weight)
    assert not takes_grouped_mm(torch.empty(8 * FEW_ROWS + 1, 32), weight)
    narrow = weight.bfloat16()
    assert takes_grouped_mm(torch.empty(8 * FEWEST_ROWS, 32).bfloat16(), narrow)
    assert not takes_grouped_mm(torch.empty(8 * FEWEST_ROWS + 1, 32).bfloat16(), narrow), "oneDNN's"
    assert not takes_grouped_mm(torch.empty(8, 32).double(), weight.double())
    assert not takes_grouped_mm(torch.empty(8, 30), torch.empty(8, 16, 30))  # 120 bytes a row
    behind_one = torch.empty(1 + weight.numel())[1:].view_as(weight)
    assert not takes_grouped_mm(torch.empty(8, 32), behind_one)  # 4 bytes past a multiple of 16
    assert not takes_grouped_mm(torch.empty(1 + 8 * 32)[1:].view(8, 32), weight)
    assert not takes_grouped_mm(torch.empty(8, 32, device="meta"), weight.to("meta"))  # which has no address
    assert not takes_grouped_mm(torch.empty(8, 32, device="meta"), weight.to("meta"))


def test_a_gpu_that_walks_through_the_experts_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(native, "print_rank_0", said.append)
    native.say_fallback.cache_clear()
    for device in ("cpu", "cuda", "cuda"):
        with FakeTensorMode():
            rows = torch.empty(3, 5, device=device)
        grouped_mm.say_loop(rows, rows)
    assert len(said) == 1 and "rows in torch.float32" in said[0] and "one product an expert" in said[0]
    native.say_fallback.cache_clear()
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(grouped_mm, "say_loop", lambda *tensors: asked.append(tuple(x.shape for x in tensors)))
    run(torch.ones(3, 5), torch.ones(3, 7, 5), (1, 1, 1))
    run(torch.ones(3, 16), torch.ones(3, 8, 16), (1, 1, 1))
    assert asked == [((3, 5), (3, 7, 5))]


def test_where_runs_end_is_sent_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By both of an expert's products, forward and backward: on a GPU each time would be a wait."""
    sent: list[list[int]] = []
    monkeypatch.setattr(grouped_mm, "upload", lambda ends, device: sent.append(ends.tolist()) or ends)
    cfg = ModelConfig(hidden_size=16, ffn_hidden_size=32, num_experts=3, activation="relu2")
    experts = MoEFFN(layer_context(cfg, torch.float32)).experts
    rows = torch.ones(9, 16, requires_grad=True)
    experts(rows, torch.ones(9), (4, 0, 5)).sum().backward()
    assert sent == [[4, 4, 9]] and rows.grad is not None
