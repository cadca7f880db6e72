"""Distillation from a checkpoint: the same at every layout, and what it is a divergence from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megaforge.errors import UserError
from megaforge.monitor.names import known
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.training.tiny import arguments, dense_arguments, make_trainer, record, write_dataset

MODEL = ("--hybrid-layer-pattern", "RE*-", "--fp64", "--moe-aux-loss-coeff", "0", "--moe-z-loss-coeff", "0")
SHORT = (*MODEL, "--train-iters", "2", "--micro-batch-size", "1", "--global-batch-size", "4", "--eval-iters", "1")
STUDENT = ("--quantize-weights", "ternary", "--objective", "distillation", "--distill-weight", "0.7")
STUDENT = (*STUDENT, "--distill-temperature", "2", "--distill-label-weight", "0.5")
RELATIONS = ("--distill-relation-weight", "3")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


@pytest.fixture(scope="module")
def teacher(prefix: str) -> str:
    path = str(Path(prefix).parent / "teacher")
    make_trainer(arguments(prefix, *MODEL, "--train-iters", "2", "--lr", "0.01", "--save", path)).train()
    return path


def test_every_layout_learns_the_same(ranks: RankPool, prefix: str, teacher: str) -> None:
    argv = arguments(prefix, *SHORT, *STUDENT, "--distill-from", teacher)
    expected = train([*argv, *RELATIONS])
    steps = [one for one in expected["records"] if one["kind"] == "step"]
    assert all(one["distill"] > 0.001 and one["relations"] > 1e-6 for one in steps)
    assert all(known("step", name) for name in ("distill", "relations"))
    layout = ("--tp", "2", "--sp", "--ep", "2", "--zero", "2", "--recompute", "moe")
    compare(ranks.run(4, train, [*argv, *RELATIONS, *layout]), expected, 1e-9)
    compare(ranks.run(2, train, [*argv, "--cp", "2"]), train(argv), 1e-9)


def test_the_terms_are_those_of_whole_logits(prefix: str, teacher: str) -> None:
    """And of these the loss is made."""
    trainer = make_trainer(arguments(prefix, *SHORT, *STUDENT, "--distill-from", teacher))
    recorder, seen = record(trainer), []
    objective: Any = trainer.objective
    plain = objective.terms

    def terms(output: Any, batch: Any) -> Any:
        with torch.no_grad():
            models = (trainer.model, objective._teacher)
            own, their = (F.log_softmax(model.logits(batch.tokens, batch.document_start) / 2, -1) for model in models)
        far = F.kl_div(own, their, reduction="none", log_target=True).sum(-1)
        seen.append((float((far * batch.loss_mask).sum()), float(batch.loss_mask.sum())))
        found = plain(output, batch)
        assert (found["loss"].weight, found["distill"].weight) == (0.5, pytest.approx(0.7 * 2**2))
        return found

    objective.terms = terms
    trainer.train()
    for number, one in enumerate(one for one in recorder.records if one["kind"] == "step"):
        sums = seen[4 * number : 4 * number + 4]
        assert one["distill"] == pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-9)


def test_a_model_learns_nothing_of_itself(prefix: str, teacher: str) -> None:
    more = ("--objective", "distillation", "--distill-from", teacher, "--distill-label-weight", "0", *RELATIONS)
    trainer = make_trainer(arguments(prefix, *SHORT, *more, "--load", teacher, "--finetune", "--train-iters", "1"))
    recorder = record(trainer)
    trainer.train()
    assert recorder.records[0]["grad_norm"] < 1e-12 and abs(recorder.records[0]["distill"]) < 1e-12


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--pp", "2"), "teacher runs whole .* use --pp 1 \\(--tp, --sp, --cp"),
        ((*RELATIONS, "--cp", "2"), "relations are of whole sequences, which --cp cuts: use --cp 1"),
        ((*RELATIONS, "--recompute", "full"), "use --recompute selective, moe or none"),
        (
            (*RELATIONS, "--distill-relation-layer", "7"),
            "--distill-relation-layer 7: that block of the model has n",
        ),
        (
            (*RELATIONS, "--num-attention-heads", "2"),
            "the model has \\[2, 2, 2\\] heads .* the teacher \\[4, 4, 4\\]",
        ),
        (("--vocab-size", "128"), "its vocabulary has .* use its tokenizer"),
        (("--distill-from", "nowhere"), "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(prefix: str, teacher: str, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(arguments(prefix, *SHORT, *STUDENT, "--distill-from", teacher, *more))


def test_16_bits_and_another_shape(prefix: str, teacher: str) -> None:
    """A student of attention and dense FFNs learns from the hybrid."""
    more = ("--bf16", "--train-iters", "2", "--distill-from", teacher, *RELATIONS)
    trainer = make_trainer(dense_arguments(prefix, "*-", *STUDENT, *more))
    recorder = record(trainer)
    trainer.train()
    assert all(0 < one["distill"] < 1 and one["relations"] > 0 for one in recorder.records)
