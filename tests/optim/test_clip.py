from __future__ import annotations

import math

import pytest
import torch

from megaforge.optim import clip_gradients, global_grad_norm
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import named_specs
from tests.optim.small_model import SmallModel, global_gradients, set_gradients
from tests.parallel.pool import RankPool


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
    ctx, norms = ParallelContext.create(tp=tp), dict[str, float]()
    clip_gradients(make(ctx, torch.float64, global_gradients(seed=3)), ctx, 0.1, 2.0, norms)
    return norms


def test_kinds_have_the_norms_of_their_own_gradients(ranks: RankPool) -> None:
    gradients, expected = global_gradients(seed=3), dict[str, float]()
    for spec, _ in named_specs(SmallModel(ParallelContext.single())):
        squares = float(gradients[spec.name].square().sum()) / 4  # the loss carried a factor of 2
        expected[spec.kind] = expected.get(spec.kind, 0.0) + squares
    expected = {kind: math.sqrt(value) for kind, value in expected.items()}
    for norms in ranks.run(2, norms_of_kinds, 2):
        assert norms == pytest.approx(expected, rel=1e-13)
