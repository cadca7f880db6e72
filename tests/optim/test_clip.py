from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaforge.optim import GradientLimits, clip_gradients, global_grad_norm
from megaforge.optim.clip import sum_of_squares, sum_of_squares_by_list
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import named_specs
from tests.optim.small_model import SmallModel, global_gradients, set_gradients
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.training.tiny import arguments, write_dataset


def true_norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))


def make(ctx: ParallelContext, dtype: torch.dtype, gradients: dict[str, torch.Tensor]) -> SmallModel:
    model = SmallModel(ctx, dtype)
    set_gradients(model, ctx, gradients)
    return model


def clip_as_rank(tp: int, max_norm: float) -> tuple[float, dict[str, torch.Tensor], int]:
    ctx = ParallelContext.create(tp=tp)
    model = make(ctx, torch.float64, global_gradients(seed=3))
    norm = clip_gradients(model, ctx, max_norm)
    return norm, {spec.name: p.main_grad for spec, p in named_specs(model)}, ctx.tp.rank


@pytest.mark.parametrize(("world_size", "tp"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_every_layout_has_the_norm_and_the_gradients_of_one_rank(ranks: RankPool, world_size: int, tp: int) -> None:
    gradients = global_gradients(seed=3)
    expected = true_norm(gradients)
    results = ranks.run(world_size, clip_as_rank, tp, 0.5 * expected)
    assert len({norm for norm, _, _ in results}) == 1  # the same bits everywhere
    assert results[0][0] == pytest.approx(expected, rel=1e-14)
    for _, local, tp_rank in results:
        ctx = ParallelContext.of_rank(tp_rank, tp, tp=tp)
        for spec, _ in named_specs(SmallModel(ctx)):
            share = spec.take_local(0.5 * gradients[spec.name], ctx)
            torch.testing.assert_close(local[spec.name], share, rtol=1e-13, atol=0)


def norm_with_one_bad_value(bad_rank: int, name: str, value: float) -> float:
    ctx = ParallelContext.create(tp=2)
    model = make(ctx, torch.float32, global_gradients(seed=3))
    if ctx.world.rank == bad_rank:
        next(p for spec, p in named_specs(model) if spec.name == name).main_grad.view(-1)[2] = value
    before = [p.main_grad.clone() for p in model.parameters()]
    norm = clip_gradients(model, ctx, 1.0, loss_scale=4.0)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.main_grad.nan_to_num(), old.nan_to_num())
    return norm


@pytest.mark.parametrize(
    ("bad_rank", "name", "value"),
    [(0, "mix", math.inf), (1, "mix", math.inf), (3, "row.weight", math.nan), (2, "mix", -math.inf)],
)
def test_one_bad_value_anywhere_is_seen_by_every_rank(ranks: RankPool, bad_rank: int, name: str, value: float) -> None:
    norms = ranks.run(4, norm_with_one_bad_value, bad_rank, name, value)
    assert not any(math.isfinite(norm) for norm in norms)


def test_gradients_below_the_limit_stay_and_zero_never_clips() -> None:
    ctx = ParallelContext.single()
    gradients = global_gradients(seed=1)
    for limit in (true_norm(gradients) * 1.001, 0.0):
        model = make(ctx, torch.float64, gradients)
        assert clip_gradients(model, ctx, limit) == pytest.approx(true_norm(gradients), rel=1e-14)
        for spec, parameter in named_specs(model):
            assert torch.equal(parameter.main_grad, gradients[spec.name])


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_the_loss_scale_leaves_norm_and_gradients(max_norm: float) -> None:
    ctx = ParallelContext.single()
    gradients = global_gradients(seed=2)
    plain, scaled = (make(ctx, torch.float64, {k: g * scale for k, g in gradients.items()}) for scale in (1.0, 1024.0))
    assert clip_gradients(scaled, ctx, max_norm, loss_scale=1024.0) == clip_gradients(plain, ctx, max_norm)
    for one, two in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.main_grad, two.main_grad, rtol=1e-15, atol=0)


def test_long_fp32_gradients_are_summed_without_loss() -> None:
    ctx = ParallelContext.single()
    model = SmallModel(ctx)
    long = torch.full((300_001,), 0.1)  # more than one block; a running fp32 sum would be off in the fourth digit
    model.declared[0].main_grad = long
    expected = 0.1 * math.sqrt(300_001)
    assert global_grad_norm(model, ctx) == pytest.approx(expected, rel=1e-7)


def norms_of_kinds(tp: int) -> dict[str, float]:
    ctx, metrics = ParallelContext.create(tp=tp), dict[str, float]()
    clip_gradients(make(ctx, torch.float64, global_gradients(seed=3)), ctx, 0.1, 2.0, metrics)
    return metrics


def test_kinds_have_the_norms_of_their_own_gradients(ranks: RankPool) -> None:
    gradients, expected = global_gradients(seed=3), dict[str, float]()
    for spec, _ in named_specs(SmallModel(ParallelContext.single())):
        squares = float(gradients[spec.name].square().sum()) / 4  # the loss carried a factor of 2
        expected[spec.kind] = expected.get(spec.kind, 0.0) + squares
    norms = {f"grad_norm/{kind}": math.sqrt(value) for kind, value in expected.items()}
    for metrics in ranks.run(2, norms_of_kinds, 2):
        assert metrics == pytest.approx({**norms, "clipped": 1.0}, rel=1e-13)


KINDS = {"column.weight": "attention", "row.weight": "ffn", "mix": "attention"}


def limited(gradients: dict[str, torch.Tensor], limits: GradientLimits) -> dict[str, torch.Tensor]:
    """What the flags promise, one limit after the other."""
    found = dict(gradients)
    if limits.value:
        found = {name: gradient.clamp(-limits.value, limits.value) for name, gradient in found.items()}
    for kind in set(KINDS.values()):
        of_kind = {name: gradient for name, gradient in found.items() if KINDS[name] == kind}
        if 0 < limits.kind_norm < true_norm(of_kind):
            found |= {name: gradient * limits.kind_norm / true_norm(of_kind) for name, gradient in of_kind.items()}
    if 0 < limits.norm < true_norm(found):
        found = {name: gradient * limits.norm / true_norm(found) for name, gradient in found.items()}
    return found


LIMITS = {
    "values": GradientLimits(value=0.3),
    "kinds": GradientLimits(kind_norm=4.0),
    "kinds, one within": GradientLimits(kind_norm=8.0),
    "values and norm": GradientLimits(norm=1.0, value=0.5),
    "all": GradientLimits(norm=2.0, kind_norm=1.9, value=0.7),
    "all, none reached": GradientLimits(norm=1e3, kind_norm=1e3, value=1e3),
    "none": GradientLimits(),
}


def limit_as_rank(
    tp: int, scale: float
) -> tuple[int, dict[str, tuple[float, dict[str, torch.Tensor], dict[str, float]]]]:
    ctx, found = ParallelContext.create(tp=tp), {}
    for name, limits in LIMITS.items():
        gradients = {key: gradient * scale for key, gradient in global_gradients(seed=3).items()}
        model, metrics = make(ctx, torch.float64, gradients), dict[str, float]()
        for spec, parameter in list(named_specs(model)):
            parameter.spec = replace(spec, kind=KINDS[spec.name])
        norm = clip_gradients(model, ctx, limits, scale, metrics)
        found[name] = norm, {spec.name: p.main_grad for spec, p in named_specs(model)}, metrics
    return ctx.tp.rank, found


@pytest.mark.parametrize(("world_size", "tp", "scale"), [(1, 1, 1.0), (2, 2, 1024.0), (4, 2, 3.0)])
def test_limits_hold_one_after_the_other_at_every_layout(
    ranks: RankPool, world_size: int, tp: int, scale: float
) -> None:
    gradients = global_gradients(seed=3)
    elements = torch.cat([gradient.flatten() for gradient in gradients.values()])
    for tp_rank, found in ranks.run(world_size, limit_as_rank, tp, scale):
        ctx = ParallelContext.of_rank(tp_rank, tp, tp=tp)
        for name, (norm, local, metrics) in found.items():
            limits, expected = LIMITS[name], limited(gradients, LIMITS[name])
            assert norm == pytest.approx(true_norm(gradients), rel=1e-13)
            for spec, _ in named_specs(SmallModel(ctx)):
                share = spec.take_local(expected[spec.name], ctx)
                torch.testing.assert_close(local[spec.name], share, rtol=1e-12, atol=0, msg=name)
            values = limited(gradients, GradientLimits(value=limits.value))
            scaled = any(not torch.allclose(expected[key], values[key]) for key in expected)
            assert metrics["clipped"] == scaled, name
            assert metrics.get("clamped") == (
                pytest.approx(float((elements.abs() > limits.value).double().mean())) if limits.value else None
            )


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_no_limit_hides_a_value_that_is_not_finite(value: float) -> None:
    ctx = ParallelContext.single()
    gradients = global_gradients(seed=1)
    gradients["mix"][2] = value
    model = make(ctx, torch.float32, gradients)
    before = [parameter.main_grad.clone() for parameter in model.parameters()]
    assert not math.isfinite(clip_gradients(model, ctx, LIMITS["all"], metrics={}))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.main_grad.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_zeros_and_extreme_gradients(size: float) -> None:
    ctx = ParallelContext.single()
    model = make(ctx, torch.float32, {key: gradient * size for key, gradient in global_gradients(seed=1).items()})
    clip_gradients(model, ctx, LIMITS["all"])
    norm = global_grad_norm(model, ctx)
    alone = size * true_norm(global_gradients(seed=1))
    assert norm == pytest.approx(min(alone, LIMITS["all"].kind_norm), rel=1e-6)  # all are of one kind here


def test_limits_are_the_same_in_stages_and_shards(ranks: RankPool, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    limits = ("--clip-grad", "0.25", "--clip-grad-per-group", "0.2", "--clip-grad-value", "0.01")
    argv = arguments(prefix, "--fp64", "--train-iters", "2", "--micro-batch-size", "1", *limits)
    expected = train(argv)
    assert all(0 < step["clamped"] < 1 and step["clipped"] == 1 for step in expected["records"])
    compare(ranks.run(4, train, [*argv, "--pp", "2", "--ep", "2", "--zero", "2"]), expected, 1e-9)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gradients_in_one_list_have_the_sum_of_each(size: float) -> None:
    """As a GPU sums them up; among them one of which this rank holds nothing."""
    generator = torch.Generator().manual_seed(2)
    gradients = [size * torch.randn(n, generator=generator) for n in (0, 1, 70_000, 3)]
    expected = sum(float(gradient.double().square().sum()) for gradient in gradients)
    for found in (sum_of_squares(gradients), sum_of_squares_by_list(gradients)):
        assert found.dtype == torch.float64 and float(found) == pytest.approx(expected, rel=1e-12)
    assert float(sum_of_squares_by_list(gradients[:1])) == 0
    for value in (torch.nan, torch.inf):
        assert not math.isfinite(float(sum_of_squares_by_list([*gradients, torch.tensor([value])])))
