"""Smoothed labels, contrasted sequences and penalties of weights: against their definitions, and at every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.errors import UserError
from megaforge.monitor.names import known
from megaforge.optim.penalty import add_penalty
from megaforge.training.objectives import make_objective
from megaforge.training.regularization import info_nce
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.training.tiny import dense_arguments, make_config, make_trainer, record, weights, write_dataset

SHORT = ("--fp64", "--train-iters", "2", "--micro-batch-size", "2", "--global-batch-size", "4", "--eval-iters", "1")
ALL = ("--label-smoothing", "0.3", "--contrastive-weight", "0.2", "--l1-coeff", "1e-3", "--l2-coeff", "1e-2")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "d")


def test_every_layout_learns_the_same(ranks: RankPool, prefix: str) -> None:
    argv = dense_arguments(prefix, "R-*-", *SHORT, *ALL)
    expected = train(argv)
    steps = [one for one in expected["records"] if one["kind"] == "step"]
    assert all(abs(one["label_smoothing"]) > 1e-6 and one["contrastive"] > 1e-3 for one in steps)
    assert all(known("step", name) for name in ("label_smoothing", "contrastive", "l1_penalty", "l2_penalty"))
    assert all({"l1_penalty", "l2_penalty"} < one.keys() for one in steps), "compared below"
    compare(ranks.run(4, train, [*argv, "--tp", "2", "--sp", "--pp", "2"]), expected, 1e-9)
    compare(ranks.run(4, train, [*argv, "--cp", "2", "--zero", "2"]), expected, 1e-9)


def test_smoothed_labels_are_torchs(prefix: str) -> None:
    """The loss and every gradient of ``cross_entropy``, over the vocabulary without its padding."""
    trainer = make_trainer(dense_arguments(prefix, "*-", *SHORT, "--label-smoothing", "0.3"))
    model, draw = trainer.model, torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 61, (2, 24), generator=draw) for _ in range(2))
    mask = (torch.rand(2, 24, generator=draw) > 0.3).double()

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    output = model(tokens, labels, mask)
    term = trainer.objective.terms(output, None)["label_smoothing"]
    ours = output.loss_sum + term.weight * term.sum
    logits = model.logits(tokens)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3, reduction="none")
    theirs = (losses.view(2, 24) * mask).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for mine, wanted in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


def naive(means: Tensor, there: list[bool], temperature: float) -> float:
    """InfoNCE as it is written down."""
    kept = [n for n, is_there in enumerate(there) if is_there]
    total = 0.0
    for a, b in ((0, 1), (1, 0)):
        for i in kept:
            near = [float(F.cosine_similarity(means[a, i], means[b, j], dim=0)) / temperature for j in kept]
            total -= near[kept.index(i)] - math.log(sum(map(math.exp, near)))
    return total / 2


@pytest.mark.parametrize("case", ["random", "alike", "empty half", "nothing", "one"])
def test_the_contrast_is_its_definition(case: str) -> None:
    sums = torch.randn(2, 1 if case == "one" else 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counts = torch.full(sums.shape[:2], 3.0, dtype=torch.float64)
    if case == "alike":
        sums[:] = sums[0, 0]
    if case == "empty half":
        sums[1, 2], counts[1, 2] = 0, 0
    if case == "nothing":
        sums[:], counts[:] = 0, 0
    sums.requires_grad_()
    found = info_nce(sums, counts, 0.5)
    there = (counts > 0).all(0).tolist()
    expected = naive((sums / counts.clamp(min=1)[..., None]).detach(), there, 0.5)
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert case != "alike" or float(found) == pytest.approx(4 * math.log(4))
    found.backward()
    assert sums.grad is not None and sums.grad.isfinite().all()
    assert torch.autograd.gradcheck(lambda x: info_nce(x, counts, 0.5), sums) or case == "nothing"


def test_halves_are_of_tokens_that_count(prefix: str) -> None:
    trainer = make_trainer(dense_arguments(prefix, "*-", *SHORT, "--contrastive-weight", "0.2"))
    model = trainer.model
    tokens = torch.arange(48).view(2, 24) % 61
    mask = torch.ones(2, 24, dtype=torch.float64)
    mask[0, 5:15], mask[1, 23] = 0, 0.5
    output = model(tokens, tokens, mask)
    term = trainer.objective.terms(output, None)["contrastive"]
    hidden = output.head_input[1].transpose(0, 1)
    halves = [slice(0, 12), slice(12, 24)]
    means = torch.stack([(hidden * mask[..., None])[:, h].sum(1) / mask[:, h].sum(1)[:, None] for h in halves])
    assert float(term.sum) == pytest.approx(naive(means.detach(), [True, True], 0.1), rel=1e-10)
    assert (term.denominator, term.weight) == ("sequences", 0.2)


@pytest.mark.parametrize("precision", ["--fp64", "--bf16"])
def test_penalties_are_gradients_of_sums(prefix: str, precision: str) -> None:
    flags = ("--optimizer", "sgd", "--sgd-momentum", "0", "--weight-decay", "0", "--clip-grad", "0", "--lr", "0.1")
    argv = dense_arguments(prefix, "*-", *SHORT, "--train-iters", "1", *flags, precision)
    argv = [flag for flag in argv if precision == "--fp64" or flag != "--fp64"]

    def trained(*more: str) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
        trainer = make_trainer([*argv, *more])
        decayed = {main.spec.name for main in trainer.optimizer.main.trained if main.spec.weight_decay}
        before, sink = weights(trainer), record(trainer)
        trainer.train()
        steps.append(sink.records[0])
        return before, weights(trainer), decayed

    steps: list[dict[str, Any]] = []
    before, plain, decayed = trained()
    _, found, _ = trained("--l1-coeff", "0.01", "--l2-coeff", "0.2")
    every = torch.cat([before[name].double().flatten() for name in decayed])
    assert {"l1_penalty", "l2_penalty"}.isdisjoint(steps[0])
    assert steps[1]["l1_penalty"] == pytest.approx(float(every.abs().sum()), rel=1e-9)
    assert steps[1]["l2_penalty"] == pytest.approx(float(every.square().sum()) / 2, rel=1e-9)
    assert 0 < len(decayed) < len(before)
    for name, start in before.items():
        penalty = 0.1 * (0.01 * start.sign() + 0.2 * start) if name in decayed else torch.zeros_like(start)
        torch.testing.assert_close(plain[name] - found[name], penalty, rtol=1e-4, atol=1e-7)


def test_without_coefficients_nothing_is_touched(prefix: str) -> None:
    config = make_config(dense_arguments(prefix, "*-")).regularization
    add_penalty(config, [None], 1.0)  # type: ignore[list-item]
    assert config.loss_terms == ()


def test_a_head_that_is_not_plain_is_told(prefix: str) -> None:

    trainer = make_trainer(dense_arguments(prefix, "*-", *SHORT, "--label-smoothing", "0.3"))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    output = trainer.model(tokens, tokens, torch.ones(1, 4))
    trainer.model.head.op = object()
    with pytest.raises(UserError, match="--label-smoothing: the output head's matrix is quantized or adapted"):
        trainer.objective.terms(output, None)


def test_a_term_may_be_reported_without_a_weight(prefix: str) -> None:
    objective = make_objective(make_config(dense_arguments(prefix, "*-", "--loss-terms", "contrastive")))
    assert list(objective._more) == ["contrastive"]  # type: ignore[attr-defined]
