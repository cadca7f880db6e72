"""The rules of quantized training against their formulas, whole, split over tp and cut by ZeRO; and in a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.errors import UserError
from megaforge.optim import Optimizer, bucket_policy
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.parallel.linear_op import PLAIN, PlainLinear, Quantized, WeightQuantizer
from megaforge.parallel.param_spec import named_specs
from megaforge.parallel.zero import ShardedParameters
from megaforge.registry import CONVERTERS
from tests.optim.small_model import SPECS, SmallModel, global_gradients, set_gradients
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.training.tiny import arguments, make_trainer, record, weights, write_dataset

RATES = (1e-2, 2e-2, 5e-3)
LARGEST = {"column.weight": 0.5, "row.weight": 0.25}
INT8 = ("--extensions", str(Path(__file__).parents[1] / "toys" / "int8_linear.py"), "--converters", "int8")


class Quarters(PlainLinear):
    """Two codes on each side of zero; one scale, or one a row."""

    quantizes = True

    def __init__(self, largest: float, rows: bool) -> None:
        self.largest, self.rows = largest, rows

    def quantize(self, weight: Tensor) -> Quantized:
        largest = torch.full((len(weight), 1) if self.rows else (), self.largest, dtype=weight.dtype)
        return Quantized((weight / largest * 2).round().clamp(-2, 2) / 2 * largest, largest)


def quantized_model(ctx: ParallelContext, dtype: torch.dtype, rows: bool) -> SmallModel:
    model = SmallModel(ctx, dtype)
    for spec, parameter in list(named_specs(model)):
        if spec.name in LARGEST:
            parameter.spec = replace(spec, quantized=True, role="matrix")
            parameter.quantizer = WeightQuantizer(Quarters(LARGEST[spec.name], rows), transposed=False)
    return model


def config(rule: str, limit: float, damping: float) -> OptimizerConfig:
    return OptimizerConfig(optimizer=rule, weight_decay=0.1, qat_latent_limit=limit, qat_damping=damping)


def expected(rule: str, limit: float, damping: float) -> dict[str, Tensor]:
    """fp64, one parameter after another; the plain rule by torch's own optimizer."""
    after = {}
    for spec, parameter in named_specs(SmallModel(ParallelContext.single(), torch.float64)):
        weight = torch.nn.Parameter(parameter.detach().clone())
        decay, largest = 0.1 if spec.weight_decay else 0.0, LARGEST.get(spec.name)
        plain: torch.optim.Optimizer
        if rule == "qat_adam":
            plain = torch.optim.AdamW([weight], betas=(0.9, 0.95), weight_decay=decay)
        else:
            plain = torch.optim.SGD([weight], lr=1.0, momentum=0.9, weight_decay=decay)
        for step, rate in enumerate(RATES):
            plain.param_groups[0]["lr"] = rate * spec.lr_mult
            weight.grad = global_gradients(step)[spec.name]
            with torch.no_grad():
                if largest:
                    code = (weight / largest * 2).round().clamp(-2, 2) / 2 * largest
                    pull = torch.where(weight.abs() > largest, 0.0, weight - code)
                    weight -= rate * spec.lr_mult * damping * pull
                plain.step()
                if largest and limit:
                    weight.clamp_(-limit * largest, limit * largest)
        after[spec.name] = weight.detach()
    return after


@pytest.mark.parametrize("rule", ["qat_adam", "qat_sgd"])
@pytest.mark.parametrize(("limit", "damping"), [(0.0, 0.0), (1.0, 0.0), (0.0, 2.0), (1.5, 3.0)])
def test_steps_follow_the_formula_at_every_layout(rule: str, limit: float, damping: float) -> None:
    after, plain = expected(rule, limit, damping), expected(rule, 0.0, 0.0)
    assert limit + damping == 0 or not torch.allclose(after["row.weight"], plain["row.weight"])
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        ctx = ParallelContext.of_rank(rank, size, tp=size)
        for rows in (False, True):
            model = quantized_model(ctx, torch.float64, rows)
            optimizer = Optimizer(config(rule, limit, damping), model, ctx)
            for step, rate in enumerate(RATES):
                set_gradients(model, ctx, global_gradients(step))
                optimizer.step(rate)
            for name, spec, tensor in optimizer.weight_entries():
                torch.testing.assert_close(tensor, spec.take_local(after[name], ctx), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", ["qat_adam", "qat_sgd"])
@pytest.mark.parametrize("rows", [False, True])
def test_a_cut_parameter_takes_the_step_of_the_whole(rule: str, rows: bool) -> None:
    flags, covered = config(rule, 1.5, 3.0), 0
    for rank in range(3):
        ctx = ParallelContext.of_rank(rank, 3)
        whole_model, model = (quantized_model(ctx, torch.float64, rows) for _ in range(2))
        whole = Optimizer(flags, whole_model, ctx)
        shards = ShardedParameters(model, ctx, bucket_size=70, policy=bucket_policy(flags))
        optimizer = Optimizer(flags, model, ctx, shards)
        for each in (whole_model, model):
            set_gradients(each, ctx, global_gradients(0))
        for parameter in model.parameters():
            held = optimizer_shard(parameter)
            parameter.main_grad = parameter.main_grad.reshape(-1)[held.start : held.stop]
        whole.step(1e-2)
        optimizer.step(1e-2)
        after = {name: tensor for name, _, tensor in whole.weight_entries()}
        for name, held, tensor in optimizer.weight_entries():
            torch.testing.assert_close(tensor, after[name].reshape(-1)[held.start : held.stop], rtol=1e-14, atol=0)
            covered += len(tensor)
    assert covered == sum(spec.numel for spec in SPECS)


@pytest.mark.parametrize("rule", ["qat_adam", "qat_sgd"])
def test_16_bit_weights_have_masters_that_go_by_the_codes_of_the_product(rule: str) -> None:
    ctx = ParallelContext.single()
    model = quantized_model(ctx, torch.bfloat16, rows=True)
    optimizer = Optimizer(config(rule, 1.0, 3.0), model, ctx)
    for step, rate in enumerate(RATES):
        set_gradients(model, ctx, global_gradients(step))
        optimizer.step(rate)
    for name, _, tensor in optimizer.weight_entries():
        assert tensor.dtype == torch.float32
        if name in LARGEST:
            assert float(tensor.abs().max()) == LARGEST[name]


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, float("nan")])
def test_zeros_and_extreme_gradients(value: float) -> None:
    ctx = ParallelContext.single()
    model = quantized_model(ctx, torch.float32, rows=False)
    optimizer = Optimizer(config("qat_sgd", 2.0, 0.5), model, ctx)
    set_gradients(model, ctx, {spec.name: torch.full(spec.shape, value, dtype=torch.float64) for spec in SPECS})
    optimizer.step(1e-2)
    for name, _, tensor in optimizer.weight_entries():
        if name in LARGEST:
            assert bool(tensor.isnan().all()) if value != value else float(tensor.abs().max()) <= 2 * LARGEST[name]


def test_a_transposed_matrix_is_quantized_as_the_product_sees_it() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    scales = torch.arange(1.0, 6.0)[:, None]

    class Rows(PlainLinear):
        def quantize(self, weight: Tensor) -> Quantized:
            return Quantized((weight / scales).round() * scales, scales)

    values, largest = WeightQuantizer(Rows(), transposed=True)(weight)
    assert torch.equal(values, (weight / scales.t()).round() * scales.t())
    assert torch.equal(largest.expand_as(weight), scales.t().expand(3, 5))
    with pytest.raises(NotImplementedError, match="PlainLinear quantizes nothing"):
        PLAIN.quantize(weight)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def test_matrices_of_a_converter_are_declared_and_only_they_are_taken(prefix: str) -> None:
    trainer = make_trainer(arguments(prefix, *INT8, "--optimizer", "qat_sgd"))
    declared = {spec.name for spec, _ in named_specs(trainer.model) if spec.quantized}
    assert len(declared) > 10 and not any(n.endswith(("router.weight", "norm.weight")) for n in declared)
    assert "embedding.weight" not in declared
    assert all(spec.quantized == hasattr(p, "quantizer") for spec, p in named_specs(trainer.model))
    rules = [rule for rules, _ in trainer.optimizer._phases for rule in rules]
    taken = {main.spec.name for rule in rules if "QAT" in type(rule).__name__ for main in rule.parameters}
    assert taken == declared
    assert set(trainer.optimizer.implementation.split(", ")) == {"torch SGD on latent weights", "torch SGD"}


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_without_limit_and_damping_it_is_the_plain_rule(prefix: str, rule: str) -> None:
    of_qat = ("--optimizer", f"qat_{rule}", "--qat-latent-limit", "0")
    short = ("--train-iters", "2", *INT8)
    pair = [make_trainer(arguments(prefix, *short, *flags)) for flags in (("--optimizer", rule), of_qat)]
    for trainer in pair:
        trainer.train()
    plain, other = map(weights, pair)
    assert all(torch.equal(tensor, other[name]) for name, tensor in plain.items())


def distance_to_codes(prefix: str, damping: str) -> tuple[float, float]:
    """Root mean square distance of latent weights to their codes, in steps between codes; and the loss."""
    flags = ("--optimizer", "qat_adam", "--qat-damping", damping, "--train-iters", "12", "--lr", "1e-5")
    trainer = make_trainer(arguments(prefix, *INT8, *flags))
    recorder = record(trainer)
    trainer.train()
    squares = []
    for spec, parameter in named_specs(trainer.model):
        if spec.quantized:
            values, largest = parameter.quantizer(parameter.detach())
            squares.append(((parameter.detach() - values) / (largest / 127)).square().flatten())
    return float(torch.cat(squares).mean().sqrt()), recorder.records[-1]["loss"]


def test_damping_brings_weights_to_their_codes_while_they_learn(prefix: str) -> None:
    (plain, loss), (damped, damped_loss) = distance_to_codes(prefix, "0"), distance_to_codes(prefix, "30000")
    assert damped < 0.7 * plain and damped_loss < 1.01 * loss


def test_every_layout_takes_the_same_steps(ranks: RankPool, prefix: str) -> None:
    qat = ("--optimizer", "qat_adam", "--qat-latent-limit", "1", "--qat-damping", "10", "--lr", "1e-3")
    argv = arguments(prefix, *INT8, *qat, "--fp64", "--train-iters", "2", "--micro-batch-size", "1")
    compare(ranks.run(4, train, [*argv, "--tp", "2", "--zero", "1"]), train(argv), 1e-9)


def test_a_rule_that_takes_nothing_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONVERTERS._parts, "nothing", lambda model, ctx: None)
    with pytest.raises(UserError, match="--optimizer qat_sgd: it takes no parameter of this model, and leaves all to"):
        make_trainer(arguments(prefix, "--converters", "nothing", "--optimizer", "qat_sgd"))


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (("--optimizer", "qat_adam"), "--optimizer qat_adam: no matrix is quantized: add --quantize"),
        (("--qat-damping", "1"), "--qat-damping 1.0: only rules for quantized training read it: add --optimizer qat"),
        (("--qat-latent-limit", "2"), "add --optimizer qat_adam or qat_sgd"),
    ],
)
def test_flags_without_their_partner_are_refused(prefix: str, flags: tuple[str, ...], advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        make_trainer(arguments(prefix, *flags))
