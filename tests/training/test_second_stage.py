"""Two stages of training: their rates, their decay, and how a run that was stopped goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.errors import UserError
from megaforge.training.callbacks import Callback
from megaforge.training.trainer import Trainer
from tests.training.tiny import dense_arguments, make_trainer, record, weights, write_dataset

STAGES = ("--second-stage-at", "0.5", "--train-iters", "4")


class Kept(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_update(self, trainer: Trainer) -> None:
        self.weights.append(weights(trainer))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def test_rate_and_decay_fall_after_the_first_stage(prefix: str) -> None:
    trainer = make_trainer(dense_arguments(prefix, "R-*-", *STAGES, "--weight-decay", "0.5"))
    plain = make_trainer(dense_arguments(prefix, "R-*-", "--train-iters", "2", "--weight-decay", "0.5"))
    recorder, kept = record(trainer), Kept()
    trainer.add(kept)
    for each in (plain, trainer):
        each.train()
    assert [entry["lr"] for entry in recorder.records] == pytest.approx([1e-3, 1e-3, 2e-3 / 3, 2e-3 / 3])
    assert [entry["weight_decay_factor"] for entry in recorder.records] == [1.0, 1.0, 0.0, 0.0]
    first = weights(plain)
    assert all(torch.equal(tensor, first[name]) for name, tensor in kept.weights[1].items()), (
        "stage one is the plain run"
    )


def test_no_decay_is_none(prefix: str) -> None:
    """Two runs that differ in their weight decay take the same steps where its factor is 0."""
    after = []
    for decay in ("0", "0.5"):
        flags = ("--second-stage-at", "0.1", "--train-iters", "2", "--weight-decay", decay)
        trainer = make_trainer(dense_arguments(prefix, "R-*-", *flags))
        trainer.train()
        after.append(weights(trainer))
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in after[0].items())


def test_a_stopped_run_goes_on_in_its_stage(prefix: str, tmp_path: Path) -> None:
    save = ("--save", str(tmp_path / "run"), "--save-interval", "1", "--keep-last", "0")
    whole = make_trainer(dense_arguments(prefix, "R-*-", *STAGES, *save))
    whole.train()
    for iteration in (1, 3):
        load = ("--load", str(tmp_path / "run" / f"step_{iteration:07}"))
        resumed = make_trainer(dense_arguments(prefix, "R-*-", *STAGES, *load))
        resumed.train()
        expected = weights(whole)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_a_second_stage_that_has_begun_stays(prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save = ("--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"))
    make_trainer(dense_arguments(prefix, "R-*-", *STAGES, *save, "--exit-interval", "3")).train()
    longer = make_trainer(dense_arguments(prefix, "R-*-", *STAGES, *save, "--train-iters", "10"))
    recorder = record(longer)
    longer.train()
    assert {entry["weight_decay_factor"] for entry in recorder.records} == {0.0}
    assert "the second stage began after iteration 2, and goes on" in "".join(capfd.readouterr())


def test_flags_of_a_stage_that_is_not_there_are_refused(prefix: str) -> None:
    for flag in ("--second-stage-lr-factor", "--second-stage-weight-decay-factor"):
        with pytest.raises(UserError, match=f"{flag} 0.3: there is no second stage: add --second-stage-at 0.5"):
            make_trainer(dense_arguments(prefix, "R-*-", flag, "0.3"))


def test_a_run_without_a_second_stage_leaves_it(prefix: str, tmp_path: Path) -> None:
    save = ("--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"))
    make_trainer(dense_arguments(prefix, "R-*-", *STAGES, *save, "--exit-interval", "3")).train()
    plain = make_trainer(dense_arguments(prefix, "R-*-", *save, "--train-iters", "4"))
    recorder = record(plain)
    plain.train()
    assert [entry["lr"] for entry in recorder.records] == [1e-3], "neither its rate nor its decay"
