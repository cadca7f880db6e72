"""LoRA: against an unsharded reference, at every layout, dropped inputs, resumed, refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.peft.lora import adapters
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, observed, trainer_of
from tests.training.tiny import VOCAB, arguments, make_config, record, write_dataset

MODEL = ("--hybrid-layer-pattern", "RE*-ME", "--activation", "swiglu", "--moe-aux-loss-coeff", "0.1")
SIZES = ("--mamba-state-dim", "8", "--mamba-head-dim", "8", "--mamba-num-groups", "4")
LORA = ("--peft", "lora", "--lora-rank", "4", "--lora-alpha", "8", "--lora-rank-pattern", "qkv.v=2", "moe=3")
SHORT = ("--train-iters", "2", "--fp64", "--moe-shared-expert-intermediate-size", "16", "--lr", "1e-3")
SHORT = (*SHORT, "--micro-batch-size", "1", "--global-batch-size", "4", "--add-bias-linear", "--lora-bias", "lora_only")
LAYOUTS = (
    (4, ("--tp", "4", "--sp", "--etp", "2", "--ep", "2")),
    (2, ("--tp", "2")),
    (4, ("--tp", "2", "--pp", "2", "--zero", "2")),
    (4, ("--tp", "2", "--sp", "--ep", "2", "--zero", "1", "--recompute", "full")),
    (2, ("--cp", "2", "--zero", "2")),
    (2, ("--pp", "2", "--pipeline-schedule", "zb-h1")),
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def flags(prefix: str, *more: str) -> list[str]:
    return arguments(prefix, *MODEL, *SIZES, *SHORT, *LORA, *more)


def train(argv: list[str]) -> dict[str, Any]:
    return observed(trainer_of(argv))


@pytest.fixture(scope="module")
def one_rank(prefix: str) -> dict[str, Any]:
    return train(flags(prefix))


@pytest.mark.parametrize(
    ("world", "layout"), LAYOUTS, ids=lambda value: "".join(value) if isinstance(value, tuple) else ""
)
def test_the_layout_changes_nothing(
    ranks: RankPool, prefix: str, one_rank: dict[str, Any], world: int, layout: tuple[str, ...]
) -> None:
    """Loss, every gradient, every update; inputs are dropped alike."""
    compare(ranks.run(world, train, flags(prefix, *layout)), one_rank, 1e-10)


def small_model(prefix: str, *more: str) -> HybridModel:
    cfg = make_config(arguments(prefix, *MODEL, *SIZES, "--vocab-size", str(VOCAB), *more)).model
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(cfg, ctx, dtype=torch.float64))
    initialize_parameters(model, ctx, seed=1)
    return model


def loss_of(model: HybridModel) -> Tensor:
    tokens = torch.arange(48).view(2, 24) % VOCAB
    return model(tokens, tokens.roll(1), torch.ones(2, 24)).loss_sum


def merged(model: HybridModel, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + scale B A of every matrix with an adapter, by the definition."""
    found = {}
    for path, layer, adapter in adapters(model):
        weight = layer.weight.detach()
        weight = weight.t() if layer.transposed else weight
        total = torch.zeros_like(weight)
        for one in adapter.factors:
            first, second = (leaves[f"{path}.lora.{one.prefix}{letter}"] for letter in "AB")
            total = total.clone()
            total[..., one.start : one.stop, :] = one.scale * (second @ first)
        total = weight + total
        found[f"{path}.weight"] = total.t() if layer.transposed else total
    return found


def test_every_gradient_is_that_of_the_merged_weights(prefix: str) -> None:
    targets = ("--peft-targets", "all-linear", "w?", "a2")
    model = small_model(prefix, *LORA, "--use-rslora", *targets)
    perturb(model, ParallelContext.single(), 0.05)
    plain = small_model(prefix)
    named = dict(model.named_parameters())
    leaves = {name: p.detach().clone().requires_grad_() for name, p in named.items() if ".lora." in name}
    base = {name: p.detach() for name, p in named.items() if ".lora." not in name}
    tokens = torch.arange(48).view(2, 24) % VOCAB
    given = (tokens, tokens.roll(1), torch.ones(2, 24))
    expected = torch.func.functional_call(plain, base | merged(model, leaves), given).loss_sum
    expected.backward()
    loss = loss_of(model)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert len(leaves) == 2 * sum(len(adapter.factors) for _, _, adapter in adapters(model)) > 20
    for name, leaf in leaves.items():
        assert leaf.grad is not None and bool(leaf.grad.any()), name
        torch.testing.assert_close(named[name].grad, leaf.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert not any(p.requires_grad for name, p in named.items() if ".lora." not in name)


def test_what_is_frozen_stays_and_inputs_are_dropped(prefix: str) -> None:
    """The bias that balances experts too; masks change the loss."""
    bias = ("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias", "--train-iters", "1")
    losses = []
    for rate in ("0", "0.5"):
        trainer = trainer_of(flags(prefix, *bias, "--lora-dropout", rate))
        perturb(trainer.model, trainer.ctx, 0.05)
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        recorder = record(trainer)
        trainer.train()
        losses.append(recorder.records[0]["loss"])
        for name, p in trainer.model.named_parameters():
            assert p.requires_grad != torch.equal(p, before[name]), name
        assert any("expert_bias" in name for name in before)
    assert losses[0] != losses[1]


def test_it_starts_as_the_base(prefix: str) -> None:
    assert loss_of(small_model(prefix, *LORA)).item() == loss_of(small_model(prefix)).item()


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("q_proj", {"layers.1.mixer.qkv.q"}),
        ("linear_qkv", {f"layers.1.mixer.qkv.{part}" for part in "qkv"}),
        ("w3", {*(f"layers.{n}.ffn.up.up" for n in range(3)), "layers.0.ffn.shared_expert.up.up",
                "layers.2.ffn.shared_expert.up.up"}),
        ("in_proj", {"layers.2.mixer.input"}),
        ("rwkv", {f"layers.0.mixer.{name}" for name in "receptance key value output w1 w2 a1 a2 g1 g2".split()}),
        ("layers.1.*", {*(f"layers.1.mixer.{name}" for name in ("qkv.q", "qkv.k", "qkv.v", "output")),
                        *(f"layers.1.ffn.{name}" for name in ("up.gate", "up.up", "down"))}),
    ],
)  # fmt: skip
def test_targets_by_our_names_and_by_others(prefix: str, pattern: str, paths: set[str]) -> None:
    model = small_model(
        prefix,
        "--peft",
        "lora",
        "--lora-rank",
        "2",
        "--peft-targets",
        pattern,
        "--moe-shared-expert-intermediate-size",
        "16",
    )
    found = {f"{path}.{one.part}".rstrip(".") for path, _, adapter in adapters(model) for one in adapter.factors}
    assert found == paths


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--peft-targets", "q_prj"), "--peft-targets q_prj: no matrix of this model has such a kind.*q_proj"),
        (("--lora-rank", "64"), r"--lora-rank 64: the matrix \S+ is \d+ x \d+; use at most"),
        (("--lora-rank-pattern", "o_proj=64"), "--lora-rank-pattern o_proj=64: the matrix"),
        (("--lora-rank-pattern", "nothing=2"), "--lora-rank-pattern nothing: no matrix"),
        (("--lora-rank-pattern", "q_proj"), "--lora-rank-pattern q_proj: write PATTERN=RANK"),
        (("--peft", "lorra"), "did you mean lora"),
    ],
)
def test_bad_input_is_named(prefix: str, more: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        small_model(prefix, "--peft", "lora", *more)
