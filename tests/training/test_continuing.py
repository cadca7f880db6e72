"""Going on otherwise: schedules that may change, must be chosen or are refused; what starts over and what is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from megaforge.checkpoint.compatible import describe_run
from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.config import Config
from megaforge.data.mock import MockData
from megaforge.data.sample_schedule import SampleSchedule
from megaforge.errors import UserError
from megaforge.optim import LearningRateSchedule
from megaforge.training.continuing import changed_settings, settle_schedule
from megaforge.training.lengths import Progress, in_iterations
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import flags, train
from tests.training.tiny import arguments, dense_arguments, make_config, make_trainer, record, write_dataset


def saved_by(*flags: str) -> dict[str, Any]:
    config = make_config(list(flags))
    digest = LearningRateSchedule(config.optimizer, config.training.train_iters).digest
    return {**describe_run(config, None), "schedule": digest}


CONSTANT, WSD = ("--lr-decay-style", "constant"), ("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "10")
RESTARTS = ("--lr-decay-style", "cosine-restarts", "--lr-restart-iters", "10")
OVERRIDE, KEEP = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"
MUON = ("--optimizer", "muon")
PLATEAU = ("--lr-decay-style", "plateau", "--eval-iters", "1", "--eval-interval", "2")


@pytest.mark.parametrize(
    ("before", "now", "iteration", "said"),
    [
        (("--train-iters", "50"), ("--train-iters", "50"), 20, None),
        ((*CONSTANT, "--train-iters", "50"), (*CONSTANT, "--train-iters", "90"), 50, None),  # a longer run
        ((*CONSTANT,), (*CONSTANT, "--lr", "5e-4"), 20, "set anew from iteration 21"),
        ((*WSD, "--train-iters", "50"), (*WSD, "--train-iters", "90"), 40, "same so far"),  # the stable part grows
        (RESTARTS, (*RESTARTS, "--lr-restart-mult", "2"), 10, "same so far"),
        (("--lr-warmup-iters", "50"), ("--lr-warmup-iters", "50", "--min-lr", "1e-5"), 50, "same so far"),
    ],
)
def test_a_schedule_that_goes_on(
    before: tuple[str, ...], now: tuple[str, ...], iteration: int, said: str | None
) -> None:
    config = make_config(list(now))
    settled, schedule, notes = settle_schedule(config, saved_by(*before), iteration, "r")
    assert settled == config
    assert schedule.digest == LearningRateSchedule(config.optimizer, config.training.train_iters).digest
    assert len(notes) == (said is not None) and (said is None or said in notes[0])


@pytest.mark.parametrize(
    ("before", "now", "batches", "said"),
    [
        ((), (), (8, 8), None),
        ((), ("--micro-batch-size", "2"), (8, 8), None),
        ((), (), (8, 16), "a global batch of 8 sequences in the checkpoint, 16 here"),
        ((), ("--optimizer", "sgd"), (8, 8), "--optimizer adam in the checkpoint, sgd here"),
        ((), ("--decoupled-lr", "1e-3"), (8, 8), "--decoupled-lr None in the checkpoint, 0.001 here"),
        ((), ("--weight-decay", "0.3"), (8, 8), "--weight-decay 0.1 in the checkpoint, 0.3 here"),
        (("--bf16",), ("--fp16",), (8, 8), "--bf16 True in the checkpoint, False here; --fp16 False in the"),
        (
            ("--global-batch-size", "8", "--rampup-batch-size", "4", "4", "80"),
            (),
            (8, 8),
            "--rampup-batch-size [4, 4, 80] in the checkpoint, [] here",
        ),
        (
            ("--grad-compression", "powersgd"),
            ("--grad-compression", "powersgd", "--grad-compression-rank", "8"),
            (8, 8),
            "--grad-compression-rank 4 in the checkpoint, 8 here",
        ),
        (MUON, (*MUON, "--muon-tp-mode", "duplicated"), (8, 8), None),
        (MUON, (*MUON, "--muon-tp-mode", "blockwise"), (8, 8), "--muon-tp-mode distributed in the checkpoint, block"),
        ((), (), (None, 16), None),  # an older checkpoint does not say
    ],
)
def test_what_is_learnt_otherwise_is_told(
    before: tuple[str, ...], now: tuple[str, ...], batches: tuple[int | None, int], said: str | None
) -> None:
    saved = {**saved_by(*before), "global_batch_size": batches[0]}
    notes = changed_settings(make_config(list(now)), batches[1], saved)
    assert (notes == []) == (said is None) and (said is None or said in notes[0])


@pytest.mark.parametrize(
    ("before", "now", "iteration", "names"),
    [
        (("--train-iters", "50"), ("--train-iters", "90"), 20, "--train-iters) 50 in the checkpoint, 90 here"),
        (("--lr", "1e-3"), ("--lr", "2e-3"), 1, "--lr 0.001 in the checkpoint, 0.002 here"),
        (CONSTANT, (), 5, "--lr-decay-style constant in the checkpoint, cosine here"),
        ((*WSD, "--train-iters", "50"), (*WSD, "--train-iters", "90"), 41, "50 in the checkpoint, 90 here"),
        (RESTARTS, (*RESTARTS, "--lr-restart-mult", "2"), 11, "--lr-restart-mult 1.0 in the checkpoint, 2.0 here"),
        (WSD, (*WSD, "--lr-wsd-decay-style", "linear"), 95, "style minus_sqrt in the checkpoint, linear here"),
        ((*CONSTANT, "--lr-warmup-iters", "9"), CONSTANT, 5, "--lr-warmup-iters 9 in the checkpoint, 0 here"),
    ],
)
def test_another_schedule_needs_a_choice(
    before: tuple[str, ...], now: tuple[str, ...], iteration: int, names: str
) -> None:
    saved = saved_by(*before)
    with pytest.raises(UserError) as caught:
        settle_schedule(make_config(list(now)), saved, iteration, "r/step_1")
    assert all(text in str(caught.value) for text in ("--load r/step_1", names, OVERRIDE, KEEP))
    own = make_config([*now, OVERRIDE])
    settled, schedule, notes = settle_schedule(own, saved, iteration, "r")
    assert schedule.digest == LearningRateSchedule(own.optimizer, own.training.train_iters).digest
    assert settled == own and OVERRIDE in notes[0] and names in notes[0]
    settled, schedule, notes = settle_schedule(make_config([*now, KEEP]), saved, iteration, "r")
    assert schedule.digest == saved["schedule"] and KEEP in notes[0]
    again = LearningRateSchedule(settled.optimizer, settled.training.train_iters)
    assert again.digest == schedule.digest, "what the next checkpoint records is the schedule that held"


def test_a_schedule_whose_file_is_gone_can_be_replaced() -> None:
    saved = saved_by()
    saved["config"]["optimizer"]["lr_decay_style"] = "waves"
    saved["schedule"] = "other"
    with pytest.raises(UserError, match=r"'waves' is not a known learning-rate schedule"):
        settle_schedule(make_config([]), saved, 5, "r")
    _, schedule, [note] = settle_schedule(make_config([OVERRIDE]), saved, 5, "r")
    assert schedule.style == "cosine" and "waves" in note


def test_both_choices_exclude_each_other() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        make_config([OVERRIDE, KEEP])


def test_what_starts_over_and_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, other = write_dataset(tmp_path / "a_text_document"), write_dataset(tmp_path / "b_text_document", seed=1)
    save = str(tmp_path / "run")
    line = ("--save", save, "--load", save, "--lr-decay-style", "constant")
    first = make_trainer(arguments(old, *line, "--train-iters", "2"))
    first.train()
    with pytest.raises(UserError, match="add --reset-data"):
        make_trainer(arguments(other, *line))
    again = arguments(other, *line, "--reset-data", "--no-load-optim", "--no-load-rng", "--train-iters", "4")
    second = make_trainer(again)
    said = capsys.readouterr().err
    assert all(flag in said for flag in ("--reset-data", "--no-load-optim", "--no-load-rng"))
    assert (second.iteration, second.consumed_samples, second.consumed_tokens) == (2, 0, first.consumed_tokens)
    assert second.optimizer.state()["step"] == 0
    assert not any(moment.any() for _, _, moment in second.optimizer.state_entries())
    for (name, _, a), (_, _, b) in zip(
        first.optimizer.weight_entries(), second.optimizer.weight_entries(), strict=True
    ):
        assert a.equal(b), name
    recorder = record(second)
    second.train()
    assert [r["consumed_samples"] for r in recorder.records] == [24, 32]
    assert recorder.records[-1]["tokens"] == 32 * 24
    third = make_trainer(again)  # the same line, after a kill: nothing starts over a second time
    assert (third.iteration, third.consumed_samples, third.optimizer.state()["step"]) == (4, 16, 2)
    assert third.consumed_tokens == second.consumed_tokens
    assert "has done so" in capsys.readouterr().err
    fourth = make_trainer(arguments(other, *line, "--train-iters", "6"))  # without the flags, the run it has become
    assert fourth.consumed_tokens == second.consumed_tokens and fourth.started_over == second.started_over
    branch = make_trainer([*again, "--load", f"{save}/step_0000004"])
    assert (branch.iteration, branch.consumed_samples) == (4, 0)


FIRST_BLOCK = """
from megaforge.optim import UpdateRule
from megaforge.registry import UPDATE_RULES


class FirstBlock(UpdateRule):
    @classmethod
    def takes(cls, spec):
        return spec.name.startswith("layers.0.")

    @classmethod
    def states(cls, config):
        return ("slow",)

    def step(self, lr, done):
        for main in self.parameters:
            main.state["slow"].lerp_(main.grad, 0.1)
            main.master.sub_(main.state["slow"], alpha=lr)


UPDATE_RULES.register("first_block", FirstBlock)
"""


def test_a_rule_with_parameters_on_one_stage_goes_on_in_stages(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "first_block.py").write_text(FIRST_BLOCK)
    rule = ("--extensions", str(tmp_path / "first_block.py"), "--optimizer", "first_block", "--pp", "2")
    save = str(tmp_path / "run")
    argv = flags(write_dataset(tmp_path / "train_text_document"), *rule, "--save", save, "--load", save)
    ranks.run(2, train, [*argv, "--train-iters", "1"])
    found = ranks.run(2, train, argv, 0.0)
    assert [record["iteration"] for record in found[1]["records"] if record["kind"] == "step"] == [2]
    with pytest.raises(AssertionError, match=r"its optimizer state \(exp_avg, exp_avg_sq, slow\) is that of"):
        ranks.run(2, train, [*argv, "--optimizer", "sgd"])


def test_a_schedule_without_the_callbacks_of_its_past_is_another() -> None:
    """Behind a plateau's back the rate may have been lower than the shape says."""
    with pytest.raises(UserError, match="--lr-decay-style plateau in the checkpoint, constant here"):
        settle_schedule(make_config([*CONSTANT]), saved_by(*PLATEAU), 5, "r")
    _, schedule, [note] = settle_schedule(make_config([*PLATEAU]), saved_by(*CONSTANT), 5, "r")
    assert schedule.style == "plateau" and "same so far" in note


def test_a_plateaus_factor_ends_with_it(tmp_path: Path) -> None:
    prefix, save = write_dataset(tmp_path / "train_text_document"), str(tmp_path / "run")
    line = [*dense_arguments(prefix, "R-"), "--save", save, "--load", save, "--keep-last", "0"]
    waiting = (
        "--eval-iters",
        "1",
        "--eval-interval",
        "1",
        "--lr-plateau-patience",
        "0",
        "--lr-plateau-threshold",
        "0.9",
    )
    style = ("--lr-decay-style", "plateau", *waiting)
    make_trainer([*line, *style, "--train-iters", "3"]).train()
    for more, rates in ((style, [2.5e-4, 1.25e-4]), ((*CONSTANT, OVERRIDE), [1e-3, 1e-3])):
        trainer = make_trainer([*line, *more, "--train-iters", "5", "--load", f"{save}/step_0000003"])
        recorder = record(trainer)
        trainer.train()
        assert [r["lr"] for r in recorder.records if r["kind"] == "step"] == pytest.approx(rates)


def test_a_kept_schedule_has_its_callbacks() -> None:
    """The callback of a plateau is made before the checkpoint is read: it must be the one that the kept shape needs."""
    for before, now in ((PLATEAU, ()), ((), PLATEAU)):
        with pytest.raises(UserError, match="write --lr-decay-style " + ("plateau" if before else "cosine")):
            settle_schedule(make_config([*now, KEEP]), saved_by(*before), 20, "r")
    saved = saved_by(*PLATEAU, "--lr-plateau-patience", "2", "--min-lr", "1e-5")
    kept = settle_schedule(make_config([*PLATEAU, "--lr", "7e-4", KEEP]), saved, 20, "r")[0].optimizer
    assert (kept.lr_plateau_patience, kept.min_lr) == (2, 1e-5) and kept.lr != 7e-4


def test_schedules_in_samples_and_of_older_versions() -> None:
    line = ("--train-samples", "800", "--lr-warmup-samples", "80", "--lr-decay-style", "linear")
    progress = Progress(MockData(SampleSchedule(1, 8), 9), BatchSchedule(8), 20, 160)

    def counted(*flags: str) -> Config:
        return in_iterations(make_config(list(flags)), progress)

    config = counted(*line)
    now = LearningRateSchedule(config.optimizer, 100, config.length, progress)
    saved = {**describe_run(config, None), "schedule": now.digest}
    assert settle_schedule(config, saved, 20, "r", progress) == (config, ANY, [])
    older = {**saved, "schedule": LearningRateSchedule(config.optimizer, 100).digest}
    assert "the learning rate was the same so far" in settle_schedule(config, older, 20, "r", progress)[2][0]
    other = counted("--train-samples", "1600", *line[2:])
    with pytest.raises(
        UserError, match=r"--lr-decay-samples \(by default --train-samples\) 800 in the checkpoint, 1600"
    ):
        settle_schedule(other, saved, 20, "r", progress)
    for changed in (other, counted("--train-iters", "100", "--lr-decay-style", "linear")):
        keep = dataclasses.replace(changed.optimizer, use_checkpoint_opt_param_scheduler=True)
        kept, schedule, _ = settle_schedule(dataclasses.replace(changed, optimizer=keep), saved, 20, "r", progress)
        again = LearningRateSchedule(kept.optimizer, kept.training.train_iters, kept.length, progress)
        assert schedule.digest == again.digest == now.digest, "its own checkpoints say so"
