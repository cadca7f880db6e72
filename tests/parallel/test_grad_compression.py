"""What 16-bit and low-rank reduction send, what they lose, and that nothing of it is lost for good."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.config.run_config import ParallelConfig
from megaforge.optim import Optimizer, clip_gradients
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.parallel.grad_compression import AllReduceHook, PowerSGD, make_comm_hook
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.param_spec import ParamSpec, make_parameter, named_specs
from megaforge.parallel.zero import ShardedParameters, shard_parameters

SPECS = (
    ParamSpec("matrix", (9, 12), Normal(1.0), role="matrix"),
    ParamSpec("stack", (3, 8, 10), Normal(1.0), role="matrix"),
    ParamSpec("thin", (2, 3), Normal(1.0), role="matrix"),
    ParamSpec("vector", (5,), Normal(1.0)),
)
RANK, STEPS = 2, 5


class Holder(nn.Module):
    """Parameters whose gradients are given: the loss is linear in each."""

    def __init__(self, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.declared = nn.ParameterList([make_parameter(spec, ctx, dtype) for spec in SPECS])
        initialize_parameters(self, ctx, seed=0)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum((g.to(p.dtype) * p).sum() for p, g in zip(self.declared, gradients, strict=True))  # type: ignore[return-value]


def given(rank: int, step: int, columns: int | None = None) -> list[Tensor]:
    """Gradients of one rank in one step; ``columns`` is the rank of each matrix, common to all ranks' column spaces."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    shared = torch.Generator().manual_seed(99)
    found = []
    for spec in SPECS:
        gradient = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        if columns is not None and len(spec.shape) > 1:
            left = torch.randn((*spec.shape[:-1], columns), generator=shared, dtype=torch.float64)
            gradient = left @ torch.randn((*spec.shape[:-2], columns, spec.shape[-1]), generator=generator).double()
        found.append(gradient)
    return found


def reduce(reducer: GradientReducer, model: Holder, gradients: list[Tensor]) -> list[Tensor]:
    reducer.zero_grad()
    reducer.set_last_microbatch(True)
    model(gradients).backward()
    reducer.finish_grad_sync()
    return [p.main_grad.clone() for p in model.declared]  # type: ignore[attr-defined]


def power_sgd(columns: int | None) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Each step's sums, and what this rank still keeps at the end."""
    ctx = ParallelContext.create()
    model = Holder(ctx, torch.float64)
    reduction = PowerSGD(RANK)
    reducer = GradientReducer(model, ctx, bucket_size=130, reduction=reduction)
    sums = [reduce(reducer, model, given(ctx.world.rank, step, columns)) for step in range(STEPS)]
    kept = [
        reduction._states[id(p)].error.view(p.shape) if reduction.compresses(p) else torch.zeros_like(p)
        for p in model.declared
    ]
    return sums, kept


def test_low_rank_gradients_arrive_whole(ranks) -> None:
    results = ranks.run(2, power_sgd, RANK)
    for sums, _ in results:
        for step, found in enumerate(sums):
            for one, a, b in zip(found, given(0, step, RANK), given(1, step, RANK), strict=True):
                torch.testing.assert_close(one, a + b, rtol=1e-8, atol=1e-8)
    # What is kept is how the ranks differ, not what the sum lacks.
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, -other, rtol=1e-8, atol=1e-8)


def test_what_power_sgd_leaves_out_is_kept_to_the_last_bit_of_it(ranks) -> None:
    """Sums sent so far + everything kept = all gradients so far; and matrices do lose something on the way."""
    results = ranks.run(2, power_sgd, None)
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "replicas must agree to the bit"
    for place, spec in enumerate(SPECS):
        true = sum(given(rank, step)[place] for rank in range(2) for step in range(STEPS))
        sent = sum(step[place] for step in results[0][0])
        kept = results[0][1][place] + results[1][1][place]
        torch.testing.assert_close(sent + kept, true, rtol=1e-11, atol=1e-11)
        assert bool(kept.any()) == (spec.name in ("matrix", "stack"))


def converge(warm: bool) -> float:
    """How far the fifth sum of a constant gradient is from it, relative; cold: a fresh right factor every step."""
    ctx = ParallelContext.create()
    model = Holder(ctx, torch.float64)
    reduction = PowerSGD(RANK)
    reducer = GradientReducer(model, ctx, reduction=reduction)
    total = torch.zeros(9, 12, dtype=torch.float64)
    for _ in range(12):
        total += reduce(reducer, model, given(ctx.world.rank, 0))[0]
        if not warm:
            reduction._states.clear()
    true = 12 * sum(given(rank, 0)[0] for rank in range(2))
    return float((total - true).norm() / true.norm())


def test_error_feedback_recovers_a_steady_gradient(ranks) -> None:
    assert ranks.run(2, converge, True)[0] < 0.5 * ranks.run(2, converge, False)[0]


def rounded(error_feedback: bool, steps: int, zero: int) -> float:
    """Sum over steps of one element, 1 + 2^-9 on rank 0 and nothing on rank 1: bf16 cannot hold it."""
    ctx = ParallelContext.create()
    model = Holder(ctx, torch.float32)
    shards = ShardedParameters(model, ctx) if zero else None
    reduction = AllReduceHook(torch.bfloat16, error_feedback=error_feedback)
    reducer = GradientReducer(model, ctx, shards=shards, reduction=reduction)
    total = 0.0
    gradients = [torch.full(spec.shape, 1 + 2.0**-9 if ctx.world.rank == 0 else 0.0) for spec in SPECS]
    for _ in range(steps):
        for parts in reduce(reducer, model, gradients):
            total += float(parts.sum())
            assert parts.dtype == torch.float32
    return total


@pytest.mark.parametrize("zero", [0, 1])
def test_bf16_rounds_and_error_feedback_makes_up_for_it(ranks, zero: int) -> None:
    elements = sum(spec.numel for spec in SPECS)
    shares = 2 if zero == 0 else 1  # whole sums on both ranks, or halves
    assert sum(ranks.run(2, rounded, False, 8, zero)) == shares * elements * 8.0
    assert sum(ranks.run(2, rounded, True, 8, zero)) == shares * elements * 8 * (1 + 2.0**-9)


def train(config: ParallelConfig) -> dict[str, Tensor]:
    ctx = ParallelContext.create()
    model = Holder(ctx, torch.float64)
    shards = shard_parameters(config, model, ctx)
    optimizer = Optimizer(OptimizerConfig(), model, ctx, shards)
    reducer = GradientReducer(model, ctx, shards=shards, reduction=make_comm_hook(config))
    for step in range(3):
        reduce(reducer, model, given(ctx.world.rank, step))
        clip_gradients(model, ctx, 1.0)
        optimizer.step(0.01)
    optimizer.wait_for_parameters()
    assert all(optimizer_shard(p).name == spec.name for spec, p in named_specs(model))
    return {spec.name: p.detach().clone() for spec, p in named_specs(model)}


@pytest.mark.parametrize("kind", ["powersgd", "bf16"])
def test_zero_and_compression_go_together(ranks, kind: str) -> None:
    plain = ranks.run(2, train, ParallelConfig(grad_compression=kind, grad_compression_rank=RANK))
    sharded = ranks.run(2, train, ParallelConfig(grad_compression=kind, grad_compression_rank=RANK, zero_stage=1))
    exact = ranks.run(2, train, ParallelConfig())[0]
    for one, other in zip(plain, sharded, strict=True):
        for name, weight in one.items():
            torch.testing.assert_close(weight, other[name], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(plain[0]["matrix"], exact["matrix"], rtol=1e-6, atol=1e-7)


def test_flags_choose_the_reduction() -> None:
    plain, rounded = make_comm_hook(ParallelConfig()), make_comm_hook(ParallelConfig(grad_reduce_in_bf16=True))
    assert isinstance(plain, AllReduceHook) and plain.dtype is None
    assert isinstance(rounded, AllReduceHook) and rounded.dtype == torch.bfloat16 and not rounded.error_feedback
    fed_back = make_comm_hook(ParallelConfig(grad_compression="bf16"))
    assert isinstance(fed_back, AllReduceHook) and fed_back.error_feedback
    low_rank = make_comm_hook(ParallelConfig(grad_compression="powersgd", grad_compression_rank=7))
    assert isinstance(low_rank, PowerSGD) and low_rank.rank == 7


def test_one_replica_sends_and_loses_nothing() -> None:
    for config in (ParallelConfig(grad_compression="powersgd"), ParallelConfig(grad_compression="bf16")):
        ctx = ParallelContext.single()
        model = Holder(ctx, torch.float64)
        found = reduce(GradientReducer(model, ctx, reduction=make_comm_hook(config)), model, given(0, 0))
        assert all(torch.equal(one, other) for one, other in zip(found, given(0, 0), strict=True))
