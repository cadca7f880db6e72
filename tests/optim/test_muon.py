"""Muon against the paper in fp64, torch.optim.Muon, and itself at other layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megaforge.config.cli import parse_config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.kernels.newton_schulz import coefficients
from megaforge.models.hybrid import HybridModel
from megaforge.optim import MainParameters, Optimizer, bucket_policy, matrices, muon
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import FlatShard, optimizer_shard
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import ParamSpec, make_parameter, named_specs
from megaforge.parallel.zero import ShardedParameters

INIT = Normal(1.0)
SPECS = (
    ParamSpec("qkv", (32, 24), INIT, shard_dim=0, parts=(16, 8, 8), role="matrix"),
    ParamSpec("output", (24, 16), INIT, shard_dim=1, role="matrix", lr_mult=2.0),
    ParamSpec("square", (16, 16), INIT, shard_dim=0, role="matrix", weight_decay=False),
    ParamSpec("wide", (8, 64), INIT, shard_dim=1, role="matrix"),  # these two by their Gram matrices
    ParamSpec("tall", (64, 8), INIT, shard_dim=0, role="matrix"),
    ParamSpec("wide, rows split", (8, 64), INIT, shard_dim=0, role="matrix"),
    ParamSpec("replicated", (12, 20), INIT, role="matrix"),
    ParamSpec("experts.up", (4, 16, 8), INIT, 1, "etp", 0, parts=(8, 8), role="matrix"),
    ParamSpec("experts.down", (4, 8, 40), INIT, 2, "etp", 0, role="matrix"),
    ParamSpec("head", (8, 16), INIT, shard_dim=0, role="matrix", update="elementwise"),
    ParamSpec("vector", (6,), INIT, tp_partial_grad=True),
)
STEPS, RATE = 3, 0.02
CONFIG = OptimizerConfig(optimizer="muon", lr=RATE, weight_decay=0.1)


class Model(nn.Module):
    """Parameters without a forward pass."""

    def __init__(self, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.declared = nn.ParameterList([make_parameter(spec, ctx, dtype) for spec in SPECS])
        initialize_parameters(self, ctx, seed=0)


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {spec.name: torch.randn(spec.shape, generator=generator, dtype=torch.float64) for spec in SPECS}


def train(
    config: OptimizerConfig, ctx: ParallelContext, dtype: torch.dtype, zero: bool = False, steps: range = range(STEPS)
) -> tuple[Optimizer, Model]:
    model = Model(ctx, dtype)
    shards = ShardedParameters(model, ctx, bucket_size=700, policy=bucket_policy(config)) if zero else None
    optimizer = Optimizer(config, model, ctx, shards)
    go_on(optimizer, model, ctx, steps)
    return optimizer, model


def go_on(optimizer: Optimizer, model: Model, ctx: ParallelContext, steps: range) -> None:
    for step in steps:
        given = gradients(step)
        for spec, parameter in named_specs(model):
            gradient, held = spec.take_local(given[spec.name], ctx), optimizer_shard(parameter)
            own = gradient.view(-1)[held.start : held.stop] if isinstance(held, FlatShard) else gradient
            parameter.main_grad = own.to(torch.float64 if parameter.dtype == torch.float64 else torch.float32)
        optimizer.step(RATE)
    optimizer.wait_for_parameters()


def whole(config: OptimizerConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    optimizer, _ = train(config, ParallelContext.single(), dtype)
    return {key: tensor.clone() for key, _, tensor in optimizer.entries()}


def orthogonalized(x: Tensor, triples: tuple[tuple[float, float, float], ...]) -> Tensor:
    """One matrix, as the paper writes it."""
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x
    y = y / y.norm()
    for a, b, c in triples:
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.T if tall else y


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mode", ["spectral", "unit_rms_norm", "shape_scaling"])
def test_steps_follow_the_formula(mode: str, nesterov: bool) -> None:
    config = replace(CONFIG, muon_scale_mode=mode, muon_use_nesterov=nesterov)
    found = whole(config, torch.float64)
    start = {spec.name: p.detach() for spec, p in named_specs(Model(ParallelContext.single(), torch.float64))}
    scale = {
        "spectral": lambda m, n: math.sqrt(max(m, n)),
        "unit_rms_norm": lambda m, n: math.sqrt(m / n),
        "shape_scaling": lambda m, n: max(1, m / n) ** 0.5,
    }[mode]
    parts = {"qkv": (16, 8, 8), "experts.up": (8, 8)}
    for spec in SPECS:
        if spec.update != "matrix":
            assert not torch.equal(found[spec.name], start[spec.name])
            assert f"optimizer.exp_avg.{spec.name}" in found
            continue
        weight, mean = start[spec.name].clone(), torch.zeros(spec.shape, dtype=torch.float64)
        for step in range(STEPS):
            gradient = gradients(step)[spec.name]
            mean = 0.95 * mean + 0.05 * gradient
            update = 0.95 * mean + 0.05 * gradient if nesterov else mean
            rate = RATE * spec.lr_mult
            weight *= 1 - rate * (0.1 if spec.weight_decay else 0.0)
            for matrix, one in zip(*(x.view(-1, *x.shape[-2:]) for x in (update, weight)), strict=True):
                for part, into in zip(*(x.split(parts.get(spec.name, len(x))) for x in (matrix, one)), strict=True):
                    made = orthogonalized(part, coefficients("quintic", 5))
                    into -= rate * 0.2 * scale(*part.shape) * made
        torch.testing.assert_close(found[spec.name], weight, rtol=1e-9, atol=1e-10, msg=spec.name)


def exactly(x: Tensor, triple: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    return orthogonalized(x.double(), (triple,) * steps).to(x.dtype)


@pytest.mark.parametrize(("precision", "tolerance"), [("low", 0.03), ("high", 1e-5)])
def test_equals_torch_muon_where_that_applies(
    precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its products are bf16, so both are as far from the formula as bf16 is; with exact products they are equal."""
    if precision == "high":
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", exactly)
    config = replace(
        CONFIG,
        muon_coefficient_type="simple",
        muon_scale_mode="shape_scaling",
        muon_extra_scale_factor=1.0,
        muon_fp32_matmul_prec=precision,
    )
    found = whole(config, torch.float32)
    start = {spec.name: p.detach() for spec, p in named_specs(Model(ParallelContext.single(), torch.float32))}
    for name in ("square", "wide", "tall", "replicated"):
        peer = nn.Parameter(start[name].clone())
        decay = 0.0 if name == "square" else 0.1
        optimizer = torch.optim.Muon([peer], lr=RATE, weight_decay=decay, momentum=0.95)
        for step in range(STEPS):
            peer.grad = gradients(step)[name].float()
            optimizer.step()
        moved = (peer - start[name]).norm()
        assert (found[name] - peer).norm() < tolerance * moved, name


Layout = tuple[dict[str, int], bool, str]  # sizes of axes, ZeRO, --muon-tp-mode
LAYOUTS: dict[int, list[Layout]] = {
    2: [
        ({"tp": 2}, False, "duplicated"),
        ({"tp": 2}, False, "distributed"),
        ({"ep": 2}, False, "distributed"),
        ({}, True, "distributed"),
    ],
    4: [
        ({"tp": 4}, False, "duplicated"),
        ({"tp": 4}, False, "distributed"),
        ({"tp": 2, "ep": 2, "etp": 2}, True, "distributed"),
        ({"tp": 2, "ep": 2, "etp": 1}, True, "duplicated"),
    ],
}


def differences(
    layouts: list[Layout], config: OptimizerConfig, dtype: torch.dtype, expected: dict[str, Tensor]
) -> dict:
    """The largest error of weights and states of this rank at each layout, relative to the largest of the tensor."""
    errors: dict[str, float] = {}
    for sizes, zero, mode in layouts:
        ctx = ParallelContext.create(**sizes)
        optimizer, _ = train(replace(config, muon_tp_mode=mode), ctx, dtype, zero)
        for key, held, tensor in optimizer.entries():
            for piece in held.pieces(ctx):
                target = expected[key][tuple(slice(low, high) for low, high in piece.global_box)]
                error = float((piece.local_view(tensor) - target).abs().max() / expected[key].abs().max())
                where = f"{sizes} zero={zero} {mode}: {key}"
                errors[where] = max(errors.get(where, 0.0), error)
    return errors


@pytest.mark.parametrize(
    ("rule", "dtype", "tolerance"),
    [("muon", torch.float64, 1e-9), ("normuon", torch.float64, 1e-9), ("muon", torch.float32, 1e-5)],
)
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_makes_the_same_update(ranks, world: int, rule: str, dtype: torch.dtype, tolerance: float) -> None:
    config = replace(CONFIG, optimizer=rule, muon_fp32_matmul_prec="high")
    expected = whole(config, dtype)
    for errors in ranks.run(world, differences, LAYOUTS[world], config, dtype, expected):
        worst = max(errors, key=lambda where: errors[where])
        assert errors[worst] < tolerance, worst


def errors_in_batches(expected: dict[str, Tensor]) -> dict[str, float]:
    """With so few elements at once that stacks are cut."""
    config = replace(CONFIG, optimizer="normuon", muon_fp32_matmul_prec="high")
    with mock.patch.object(muon.Muon, "most_at_once", 600):
        return differences(
            [({"tp": 2}, False, "distributed"), ({}, True, "distributed")], config, torch.float64, expected
        )


def test_batches_of_matrices_change_nothing(ranks) -> None:
    model = Model(ParallelContext.single(), torch.float64)
    taken = [main for main in MainParameters(model).trained if muon.Muon.takes(main.spec)]
    stacks = matrices.stacks_of(taken, ParallelContext.single())
    pieces = sum(len(stack.pieces) for stack in stacks)
    for most, least in ((1, pieces), (600, 2), (1 << 20, 1)):
        batches = matrices.in_batches(stacks, most)
        sizes = [sum(math.prod(piece.shape) for stack in batch for _, piece in stack.pieces) for batch in batches]
        assert all(
            size <= most or len(batch) == len(batch[0].pieces) == 1 for size, batch in zip(sizes, batches, strict=True)
        )
        assert sum(sizes) == sum(main.spec.numel for main in taken)
        assert least <= len(batches) <= pieces and (most < 1 << 20 or len(batches) == 1)
    expected = whole(replace(CONFIG, optimizer="normuon", muon_fp32_matmul_prec="high"), torch.float64)
    for errors in ranks.run(2, errors_in_batches, expected):
        assert max(errors.values()) < 1e-9


def blockwise() -> float:
    config = replace(CONFIG, muon_tp_mode="blockwise")
    ctx = ParallelContext.create(tp=2)
    return max(differences_of(config, ctx).values())


def differences_of(config: OptimizerConfig, ctx: ParallelContext) -> dict[str, float]:
    expected = whole(replace(config, muon_tp_mode="distributed"), torch.float64)
    optimizer, _ = train(config, ctx, torch.float64)
    return {
        key: float((tensor - spec.take_local(expected[key], ctx)).abs().max())  # type: ignore[union-attr]
        for key, spec, tensor in optimizer.weight_entries()
    }


def test_blocks_of_matrices_are_another_update(ranks) -> None:
    assert min(ranks.run(2, blockwise)) > 1e-3


def unsplit_states() -> dict[str, Tensor]:
    config = replace(CONFIG, optimizer="normuon", muon_tp_mode="blockwise")
    optimizer, _ = train(config, ParallelContext.create(tp=2), torch.float64)
    return {key: tensor for key, spec, tensor in optimizer.state_entries() if spec.shard_dim is None}  # type: ignore[union-attr]


def test_what_is_saved_once_is_the_same_on_all_ranks(ranks) -> None:
    """Mean squares of rows whose columns are split, of blocks, too."""
    one, two = ranks.run(2, unsplit_states)
    assert any("row_square" in key for key in one)
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key


@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_a_reloaded_optimizer_continues_bit_for_bit(rule: str) -> None:
    ctx, config = ParallelContext.single(), replace(CONFIG, optimizer=rule)
    optimizer, model = train(config, ctx, torch.bfloat16)
    other, again = train(config, ctx, torch.bfloat16, steps=range(0))
    for (_, _, into), (_, _, saved) in zip(other.entries(), optimizer.entries(), strict=True):
        into.copy_(saved)
    other.load_state(optimizer.state())
    other.after_load()
    for one, two in ((optimizer, model), (other, again)):
        go_on(one, two, ctx, range(STEPS, STEPS + 2))
    for (key, _, one), (_, _, two) in zip(optimizer.entries(), other.entries(), strict=True):
        assert torch.equal(one, two), key


def test_rows_of_normuon_move_alike() -> None:
    config = replace(CONFIG, optimizer="normuon", normuon_beta2=0.0, weight_decay=0.0)
    start = Model(ParallelContext.single(), torch.float64)
    optimizer, _ = train(config, ParallelContext.single(), torch.float64, steps=range(1))
    plain, _ = train(replace(config, optimizer="muon"), ParallelContext.single(), torch.float64, steps=range(1))
    before = {spec.name: p.detach() for spec, p in named_specs(start)}
    muon_weights = {key: tensor for key, _, tensor in plain.weight_entries()}
    for key, _, tensor in optimizer.weight_entries():
        if key in ("square", "tall", "replicated"):
            norms = (tensor - before[key]).norm(dim=1)
            torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-9, atol=0)
            moved = (muon_weights[key] - before[key]).norm()
            torch.testing.assert_close((tensor - before[key]).norm(), moved, rtol=1e-9, atol=0)


def one_step(gradient: Tensor, rule: str = "muon") -> Tensor:
    """The update of a matrix from one gradient."""
    ctx = ParallelContext.single()
    model = nn.Module()
    model.weight = make_parameter(ParamSpec("w", tuple(gradient.shape), INIT, role="matrix"), ctx, torch.float32)
    model.weight.data.zero_()
    model.weight.main_grad = gradient
    optimizer = Optimizer(replace(CONFIG, optimizer=rule), model, ctx)
    optimizer.step(1.0)
    return model.weight.detach()


@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_degenerate_matrices(rule: str) -> None:
    zeros = one_step(torch.zeros(4, 6), rule)
    assert torch.equal(zeros, torch.zeros(4, 6))
    for shape in ((1, 7), (7, 1), (1, 1)):
        update = one_step(torch.ones(shape), rule)
        assert update.isfinite().all() and (update < 0).all()
    alike = one_step(torch.ones(4, 6), rule)
    assert alike.isfinite().all()
    for size in (1e30, 1e-3):  # the size of a gradient does not matter
        generator = torch.Generator().manual_seed(0)
        gradient = torch.randn(4, 32, generator=generator)
        torch.testing.assert_close(one_step(gradient * size, rule), one_step(gradient, rule), rtol=0.05, atol=0.02)
    broken = torch.ones(4, 6)
    broken[0, 0] = float("nan")
    assert one_step(broken, rule).isnan().any()


def extremes() -> list[float]:
    """Matrices that are split along their longer side, of extreme sizes: their largest singular values, scaled back."""
    axis = ParallelContext.create(tp=2).tp
    x = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([1e30, 1e-6, 1.0, 0.0])
    kind = matrices.MatrixKind(8, 64, 1, "tp")
    config = replace(CONFIG, muon_fp32_matmul_prec="high")
    rule = muon.Muon(config, (), replace(ParallelContext.single(), tp=axis))
    part = (x * sizes.view(-1, 1, 1)).chunk(2, 2)[axis.rank]
    (made,) = matrices.shared([rule._job(kind, part)], axis)
    whole_x = rule._whole(kind, x)
    whole_x[3] = 0
    return [float((made - whole_x.chunk(2, 2)[axis.rank]).abs().max())]


def test_gram_matrices_of_extreme_sizes(ranks) -> None:
    assert max(error for one in ranks.run(2, extremes) for error in one) < 1e-5


def test_owners_have_about_the_same_to_do() -> None:
    costs = (5.0, 1.0, 2.0)
    owners = matrices.owners_of([(5.0, 3), (1.0, 9), (2.0, 0)], 4)
    load = [sum(float((o == rank).sum()) * cost for o, cost in zip(owners, costs, strict=True)) for rank in range(4)]
    assert sorted(load) == [6.0, 6.0, 6.0, 6.0]


def work_of_a_step(sizes: dict[str, int], zero: bool, hidden: int) -> float:
    """Multiply-adds of this rank's Newton-Schulz iterations in a step of a CDRmix model, counted."""
    ctx = ParallelContext.create(**sizes)
    flags = ["--config", "cdrmix-tiny", "--vocab-size", "64", "--hidden-size", str(hidden), "--rwkv-init", "normal"]
    config = replace(CONFIG, muon_fp32_matmul_prec="low")
    model = HybridModel(make_layer_context(parse_config(flags).config.model, ctx))
    shards = ShardedParameters(model, ctx, policy=bucket_policy(config)) if zero else None
    optimizer = Optimizer(config, model, ctx, shards)
    for _, parameter in named_specs(model):
        parameter.main_grad = torch.zeros(optimizer_shard(parameter).local_shape(ctx))
    counted = [0.0]

    def count(x: Tensor, **_: object) -> Tensor:
        counted[0] += len(x) * muon.multiply_adds(config, matrices.MatrixKind(x.shape[1], x.shape[2], None, "tp"))
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "newton_schulz", count)
        optimizer.step(RATE)
    optimizer.wait_for_parameters()
    return counted[0]


@pytest.mark.parametrize("hidden", [192])
def test_ranks_share_the_work(ranks, hidden: int) -> None:
    alone = work_of_a_step({}, False, hidden)
    shared = ranks.run(4, work_of_a_step, {"tp": 2}, True, hidden)
    assert sum(shared) == pytest.approx(alone)
    assert max(shared) <= 1.15 * alone / 4
