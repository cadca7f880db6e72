"""Quantized models: the same codes, losses and gradients at every layout; which matrices; resumed; flags."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.layers import linears
from megaforge.parallel.linear_op import PLAIN
from megaforge.parallel.mappings import gather_from_sequence_parallel
from megaforge.parallel.param_spec import spec_of
from megaforge.quant.linear import QuantizedLinear
from megaforge.training.trainer import Trainer
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, observed, trainer_of, whole
from tests.training.tiny import VOCAB, arguments, make_config, make_trainer, weights, write_dataset

MODEL = ("--hybrid-layer-pattern", "RE*-", "--activation", "swiglu", "--moe-aux-loss-coeff", "0.1")
SHORT = ("--train-iters", "2", "--fp64", "--sub-norm", "--moe-shared-expert-intermediate-size", "16")
SHORT = (*SHORT, "--lr", "1e-3", "--micro-batch-size", "1", "--global-batch-size", "4")
RECIPES = {
    "ternary": ("--quantize-weights", "ternary"),
    "binary": (
        *("--quantize-weights", "binary", "--quant-noise", "0.2", "--asymmetric-activations", "--online-calibration"),
        *("--quant-clip", "weights", "--quant-clip-interval", "1", "--quant-clip-grid", "0.9", "1"),
        *("--eval-iters", "1"),
    ),
    "rows": ("--quantize-weights", "int4", "--quant-granularity", "channel", "--hadamard", "4", "--asymmetric-weights"),
}
LAYOUTS = (
    ("ternary", 4, ("--tp", "4", "--sp", "--etp", "2")),
    ("ternary", 4, ("--tp", "2", "--pp", "2", "--zero", "2", "--micro-batch-size", "1")),
    ("binary", 4, ("--tp", "2", "--sp", "--ep", "2", "--zero", "1", "--recompute", "full")),
    ("binary", 2, ("--cp", "2", "--zero", "2")),
    ("rows", 2, ("--tp", "2", "--sp")),
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def codes_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole int8 codes of every quantized matrix that this rank has a part of."""
    found = {}
    for _, layer in linears(trainer.model):
        if isinstance(layer.op, QuantizedLinear):
            spec = spec_of(layer.weight)
            found[spec.name] = whole(spec, layer.op.codes(layer.weight)[0].double(), trainer.ctx).to(torch.int8)
    return found


def train(argv: list[str]) -> dict[str, Any]:
    """A run, its records, gradients, weights and last codes."""
    trainer = trainer_of(argv)
    return observed(trainer) | {"codes": codes_of(trainer)}


def flags(prefix: str, recipe: str, *more: str) -> list[str]:
    return arguments(prefix, *MODEL, *SHORT, *RECIPES[recipe], *more)


@pytest.fixture(scope="module")
def one_rank(prefix: str) -> dict[str, dict[str, Any]]:
    return {recipe: train(flags(prefix, recipe)) for recipe in RECIPES}


@pytest.mark.parametrize(("recipe", "world", "layout"), LAYOUTS)
def test_the_layout_changes_no_code(
    ranks: RankPool, prefix: str, one_rank: dict[str, Any], recipe: str, world: int, layout: tuple[str, ...]
) -> None:
    expected = one_rank[recipe]
    found = ranks.run(world, train, flags(prefix, recipe, *layout))
    compare(found, expected, 1e-9)
    assert {name for rank in found for name in rank["codes"]} == set(expected["codes"])
    for rank in found:
        for name, codes in rank["codes"].items():
            assert torch.equal(codes, expected["codes"][name]), name


def test_every_option_changes_the_loss(one_rank: dict[str, Any], prefix: str) -> None:
    """And ternary matrices have three levels, of q, k and v by themselves."""
    names = set(one_rank["ternary"]["codes"])
    kinds = ("qkv", "output", "receptance", "key", "value", "ffn.up", "ffn.down", "shared_expert.up")
    assert all(any(kind in name for name in names) for kind in kinds)
    assert not any(word in name for name in names for word in ("embedding", "head", "router", "w1", "w2", "norm"))
    assert {int(code) for code in one_rank["ternary"]["codes"]["layers.1.mixer.qkv.weight"].unique()} == {-1, 0, 1}
    assert {int(code) for code in one_rank["binary"]["codes"]["layers.0.ffn.up.weight"].unique()} == {-1, 1}
    losses = {recipe: run["records"][0]["loss"] for recipe, run in one_rank.items()}
    assert len({*losses.values()}) == 3


def first_loss(prefix: str, *more: str) -> float:
    cfg = make_config(arguments(prefix, "--hybrid-layer-pattern", "R-*-", "--vocab-size", str(VOCAB), *more)).model
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(cfg, ctx))
    initialize_parameters(model, ctx, seed=1)
    perturb(model, ctx, 0.05)
    tokens = torch.arange(48).view(2, 24) % VOCAB
    return model(tokens, tokens.roll(1), torch.ones(2, 24)).loss_sum.item()


def test_every_flag_changes_the_loss(prefix: str) -> None:
    base = ("--quantize-weights", "int4", "--quantize-activations", "int4")
    group = ("--quant-granularity", "group", "--quant-group-size")
    variants: list[tuple[str, ...]] = [
        (), base, (*base, "--quantize-activations", "none"), (*base, "--quantize-activations", "int8"),
        (*base, "--asymmetric-weights"), (*base, "--asymmetric-activations"), (*base, "--quant-noise", "0.5"),
        (*base, "--hadamard", "8"), (*base, "--quant-granularity", "channel"), (*base, *group, "4"),
        (*base, *group, "8"), (*base, "--bitnet-layers", "attention"), (*base, "--bitnet-layers", "ffn.up", "rwkv"),
        (*base, "--quant-scale-dtype", "bf16"), (*base, "--sub-norm"), base[2:],
    ]  # fmt: skip
    losses = {variant: first_loss(prefix, *variant) for variant in variants}
    assert len({*losses.values()}) == len(variants), losses


@pytest.mark.parametrize("kind", ["--fp16", "--bf16"])
def test_16_bit_training_goes_on_as_if_it_had_never_stopped(prefix: str, tmp_path: Path, kind: str) -> None:
    flags = (*RECIPES["ternary"], kind, "--hybrid-layer-pattern", "*-RE", "--sub-norm", "--ema-decay", "0.9")
    flags = ("--hybrid-layer-pattern", "RE*-", *flags[:3], *flags[5:], "--train-iters", "2", "--eval-iters", "1")
    flags = (*flags, "--eval-interval", "1", "--ema-evaluate")
    expected = make_trainer(arguments(prefix, *flags))
    expected.train()
    save = ("--save", str(tmp_path / "run"))
    make_trainer(arguments(prefix, *flags, *save, "--exit-interval", "1")).train()
    resumed = make_trainer(arguments(prefix, *flags, *save, "--load", str(tmp_path / "run")))
    resumed.train()
    theirs = weights(expected)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(resumed).items())
    before, after = codes_of(expected), codes_of(resumed)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_full_precision_weights_go_on_as_codes(prefix: str, tmp_path: Path) -> None:
    save, load = ("--save", str(tmp_path / "run")), ("--load", str(tmp_path / "run"))
    flags = ("--hybrid-layer-pattern", "R-*-", "--train-iters", "1")
    plain = make_trainer(arguments(prefix, *flags, *save))
    plain.train()
    ternary = make_trainer(arguments(prefix, *flags, *load, "--finetune", *RECIPES["ternary"]))
    theirs = weights(plain)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(ternary).items())
    ternary.train()
    with pytest.raises(UserError, match="--quantize-weights None in the checkpoint, ternary here"):
        make_trainer(arguments(prefix, *flags, *load, *RECIPES["ternary"]))
    with pytest.raises(UserError, match="--sub-norm False in the checkpoint, True here"):
        make_trainer(arguments(prefix, *flags, *load, "--finetune", "--sub-norm"))


SUMMED = (("--quantize-weights", "ternary", "--sub-norm"), RECIPES["rows"])


def hidden_states(prefix: str, tp: int) -> list[torch.Tensor]:
    """What the final norm is given, whole, in fp32 and bf16, of each kind of row layer."""
    ctx = ParallelContext.create(tp=tp) if tp > 1 else ParallelContext.single()
    torch.set_float32_matmul_precision("highest")  # what other tests have left to the ranks may differ
    found = []
    for more, dtype in product(SUMMED, (torch.float32, torch.bfloat16)):
        flags = arguments(prefix, "--hybrid-layer-pattern", "*-*-", "--vocab-size", str(VOCAB), *more)
        layer = make_layer_context(make_config(flags).model, ctx, dtype=dtype, sequence_parallel=tp > 2)
        model = HybridModel(layer)
        initialize_parameters(model, ctx, seed=1)
        perturb(model, ctx, 0.05)
        model.final_norm.register_forward_pre_hook(lambda module, given: found.append(given[0].detach()))
        tokens = torch.arange(48).view(2, 24) % VOCAB
        model(tokens, tokens.roll(1), torch.ones(2, 24))
        if tp > 2:
            found[-1] = gather_from_sequence_parallel(found[-1], ctx.tp)
    return found


def test_row_layers_sum_codes_so_that_every_split_has_the_same_bits(ranks: RankPool, prefix: str) -> None:
    [expected] = ranks.run(1, hidden_states, prefix, 1)
    for tp in (2, 4):
        for rank in ranks.run(tp, hidden_states, prefix, tp):
            assert [one.dtype for one in rank] == [torch.float32, torch.bfloat16] * 2
            assert all(torch.equal(one, whole) for one, whole in zip(rank, expected, strict=True))


def layers_of(prefix: str, *more: str) -> set[str]:
    cfg = make_config(arguments(prefix, *MODEL, "--vocab-size", "64", *RECIPES["ternary"], *more)).model
    model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta")))
    return {path for path, layer in linears(model) if layer.op is not PLAIN}


def test_patterns_choose_by_kind_and_by_the_end_of_a_path(prefix: str) -> None:
    every = layers_of(prefix)
    assert layers_of(prefix, "--bitnet-layers", "all") == every
    assert layers_of(prefix, "--bitnet-layers", "attention") == {"layers.1.mixer.qkv", "layers.1.mixer.output"}
    assert layers_of(prefix, "--bitnet-layers", "moe", "key") == {
        "layers.0.ffn.up", "layers.0.ffn.down", "layers.0.mixer.key",
    }  # fmt: skip
    assert layers_of(prefix, "--bitnet-layers", "layers.0.*") == {path for path in every if "layers.0." in path}
    for nothing in ("head", "router", "w2", "mixer", "quv"):
        with pytest.raises(UserError, match=f"--bitnet-layers {nothing}: no matrix .* use all, a kind \\(rwkv, moe"):
            layers_of(prefix, "--bitnet-layers", "attention", nothing)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bitnet-layers", "ffn"), "nothing is quantized: add --quantize-weights ternary"),
        (("--quant-noise", "0.1"), "no matrix is quantized: add --quantize-weights ternary"),
        (
            ("--quantize-weights", "int4", "--quant-group-size", "8"),
            "add --quantize-weights and --quant-granularity gr",
        ),
        (("--hadamard", "8"), "no activation is quantized: add"),
        (("--quantize-weights", "binary", "--asymmetric-weights"), "binary is symmetric; use int4 or int8"),
        (("--quantize-weights", "binary", "--hadamard", "12"), "--hadamard 12: use a power of two"),
        (("--quantize-weights", "binary", "--hadamard", "64"), "--hadamard 64: it does not divide the 32 input feat"),
        (("--converters", "bitnet"), "it quantizes nothing: add --quantize-weights ternary"),
        (
            ("--quantize-weights", "int4", "--quant-granularity", "group", "--quant-group-size", "64"),
            "--quant-group-size 64: it does not divide the 32 input features that a rank has of layers.0.mixer.rec.* "
            "up to 32",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(prefix: str, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(arguments(prefix, *more))
