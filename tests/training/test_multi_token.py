"""Training with multi-token prediction: what counts, what is recorded, and going on from a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megaforge.checkpoint.architectures.base import choose
from megaforge.checkpoint.megatron.arguments import args_of
from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.blocks import describe_blocks
from megaforge.data.loader import GlobalBatchLoader
from megaforge.errors import UserError
from megaforge.monitor import names
from megaforge.training.multi_token import PredictsAhead, targets_ahead
from megaforge.training.objectives import NextToken, make_objective
from tests.training.tiny import arguments, make_trainer, record, write_dataset

AHEAD = ("--mtp-num-layers", "2", "--hidden-dropout", "0.1")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


@pytest.mark.parametrize("reset", [True, False])
def test_each_prediction_is_a_mean_over_its_own_labels(prefix: str, reset: bool) -> None:
    """Documents of a few tokens, of which the later predictions have fewer labels; micro-batches differ in them."""
    flags = ["--fp64", "--data-lanes", "1", "--mtp-num-layers", "2"]
    flags += [] if reset else ["--no-reset-at-document-boundaries"]
    trainer = make_trainer(arguments(prefix, *flags))
    cfg = trainer.config.model
    assert isinstance(trainer.objective, PredictsAhead) and trainer.objective.look_ahead == 3
    batches = next(iter(GlobalBatchLoader(trainer.data, BatchSchedule(8), 2, look_ahead=3)))
    sums, counts = [0.0, 0.0], [0.0, 0.0]
    trainer.model.train()
    for batch in batches:
        later = targets_ahead(batch, cfg)
        for number, (_, mask) in enumerate(later):
            counts[number] += float(mask.sum())
        info = trainer.model.pack(batch.tokens, batch.document_start)
        output, _ = trainer.model.run_stage(batch.tokens, batch.labels, batch.loss_mask, info, later)
        for number in range(2):
            sums[number] += float(output.terms[f"mtp_loss/{number + 1}"].sum.detach())
    everything = 8.0 * batches[0].tokens.shape[1]
    assert counts[1] < counts[0] < everything if reset else counts == [everything] * 2
    metrics = trainer.train_step(batches)
    for number in range(2):
        assert metrics.extra[f"mtp_loss/{number + 1}"] == pytest.approx(sums[number] / counts[number], rel=1e-12)


def test_it_learns_resumes_and_is_evaluated_by_the_next_token(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On through a checkpoint as without one; another weight may be taken up."""
    flags = (*AHEAD, "--train-iters", "6", "--eval-iters", "1", "--eval-interval", "3")
    whole = make_trainer(arguments(prefix, *flags))
    recorder = record(whole)
    whole.train()
    assert len(re.findall(r" \| further tokens \d\.\d{4}, \d\.\d{4} \| ", capsys.readouterr().out)) == 6
    assert "2 further tokens (sequential), each by attention + " in describe_blocks(whole.config.model)
    steps = [one for one in recorder.records if one["kind"] == "step"]
    assert all(names.known("step", name) for name in steps[0] if name.startswith("mtp"))
    assert steps[-1]["mtp_loss/2"] < steps[0]["mtp_loss/2"]
    assert not [name for one in recorder.records if one["kind"] == "evaluation" for name in one if "mtp" in name]
    save = ("--save", str(tmp_path), "--load", str(tmp_path))
    make_trainer(arguments(prefix, *flags, *save, "--exit-interval", "3")).train()
    resumed = make_trainer(arguments(prefix, *flags, *save))
    again = record(resumed)
    resumed.train()
    for name in ("loss", "grad_norm", "mtp_loss/1", "mtp_loss/2"):
        theirs = [one[name] for one in steps[3:]]
        assert [one[name] for one in again.records if one["kind"] == "step"] == pytest.approx(theirs, rel=1e-9)
    make_trainer(arguments(prefix, *flags, *save, "--mtp-loss-scaling-factor", "0.3"))
    with pytest.raises(UserError, match="--mtp-num-layers 2 in the checkpoint, 1 here"):
        make_trainer(arguments(prefix, *flags, "--load", str(tmp_path), "--mtp-num-layers", "1"))


def test_any_objective_looks_as_far_as_it_needs(prefix: str) -> None:
    config = make_trainer(arguments(prefix, *AHEAD)).config

    class Far(NextToken):
        look_ahead = 5

    far = PredictsAhead(Far(config), config.model)
    assert far.look_ahead == 5 and far.takes_loss_sum
    assert isinstance(make_objective(config), PredictsAhead)
    batch = next(iter(GlobalBatchLoader(make_trainer(arguments(prefix)).data, BatchSchedule(8), 8, look_ahead=1)))[0]
    assert targets_ahead(batch, config.model) == [] and far.counts(batch).keys() == {"labels"}
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])


def test_exchange_formats_have_no_place_for_it(prefix: str) -> None:
    config = make_trainer(arguments(prefix, *AHEAD, "--layer-schedule", "attention", "--ffn", "dense")).config
    with pytest.raises(UserError, match="--to hf: the run predicts 2 further tokens"):
        choose(config.model, "the run", "--to hf", [])
    with pytest.raises(UserError, match="further predictions"):
        args_of(config)
