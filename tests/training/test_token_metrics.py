"""``--evaluation-metrics``: against the definition, at every layout, by an entry point; and what is refused."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.models.hybrid import ModelOutput
from megaforge.registry import EVALUATION_METRICS
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.training.tiny import dense_arguments, make_trainer, record, write_dataset

ASKED = ("--fp64", "--train-iters", "1", "--eval-iters", "2", "--evaluation-metrics", "label_probability")
GROUP = "megaforge.evaluation_metrics"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "d")


def evaluated(trainer: Trainer) -> dict[str, Any]:
    """The record of the evaluation behind the only step."""
    recorder = record(trainer)
    trainer.train()
    return next(one for one in recorder.records if one["kind"] == "evaluation")


def test_it_is_the_mean_over_labels_at_every_layout(ranks: RankPool, prefix: str) -> None:
    argv = dense_arguments(prefix, "R-*-", *ASKED)
    trainer = make_trainer(argv)
    found = evaluated(trainer)
    assert trainer.validation is not None
    total, labels = 0.0, 0
    for number in range(2 * 8):
        tokens, marks = np.zeros(25, np.int64), np.zeros(25, np.bool_)
        count = trainer.validation.fill(number, tokens, marks)
        given = torch.from_numpy(tokens)[None, :-1], torch.from_numpy(marks)[None, :-1]
        chances = trainer.model.logits(*given)[0].detach().softmax(-1)
        total += sum(float(chances[place, tokens[place + 1]]) for place in range(count))
        labels += count
    assert found["tokens"] == labels and found["label_probability"] == pytest.approx(total / labels, rel=1e-9)
    expected = train(argv)
    compare(ranks.run(4, train, [*argv, "--tp", "2", "--sp", "--pp", "2"]), expected, 1e-9)
    compare(ranks.run(4, train, [*argv, "--cp", "2", "--zero", "2"]), expected, 1e-9)


def doubled(config: Any) -> Any:
    """A package's: twice the loss."""
    return lambda output: 2 * output.losses_SB


def test_a_package_adds_one_by_an_entry_point(
    prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = importlib.metadata.EntryPoint("doubled", f"{__name__}:doubled", GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == GROUP else [])
    monkeypatch.setattr(EVALUATION_METRICS, "_group", GROUP)
    monkeypatch.setattr(EVALUATION_METRICS, "_parts", dict(EVALUATION_METRICS._parts))
    monkeypatch.setattr(EVALUATION_METRICS, "_unread", set(EVALUATION_METRICS._unread))
    found = evaluated(make_trainer(dense_arguments(prefix, "*-", *ASKED, "doubled")))
    assert found["doubled"] == pytest.approx(2 * found["loss"], rel=1e-12) and 0 < found["label_probability"] < 1
    shown = capsys.readouterr()
    assert f"| doubled {found['doubled']:.4g} |" in shown.out + shown.err


def test_what_is_no_metric_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sums(output: ModelOutput) -> Tensor:
        return output.losses_SB.sum()

    monkeypatch.setattr(EVALUATION_METRICS, "_parts", EVALUATION_METRICS._parts | {"loss": doubled, "sum": doubled})
    with pytest.raises(UserError, match="--evaluation-metrics loss: evaluations have a number of this name"):
        make_trainer(dense_arguments(prefix, "*-", *ASKED, "loss"))
    with pytest.raises(UserError, match="'label_probabilty' is not a known .*did you mean label_probability"):
        make_trainer(dense_arguments(prefix, "*-", *ASKED, "label_probabilty"))
    monkeypatch.setattr(EVALUATION_METRICS, "_parts", EVALUATION_METRICS._parts | {"sum": lambda config: sums})
    with pytest.raises(UserError, match=r"--evaluation-metrics sum: it gives \[\] numbers; give one for each token, "):
        make_trainer(dense_arguments(prefix, "*-", *ASKED, "sum")).train()
