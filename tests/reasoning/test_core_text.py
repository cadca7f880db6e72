"""Stage B measures stage A's validation text before and after: with adapters, and with adapters reset."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaforge.checkpoint.checkpoint import read_meta
from megaforge.checkpoint.directory import list_steps
from megaforge.config.core_text_config import CoreTextConfig
from megaforge.config.stage_config import StageConfig
from megaforge.data.data_source import SampleView
from megaforge.errors import UserError
from megaforge.monitor.names import known
from megaforge.reasoning.core_text import CoreText, FirstSamples
from megaforge.resilience.requests import Requests
from megaforge.training.trainer import Trainer
from tests.training.tiny import dense_arguments, make_trainer, record, weights, write_dataset

LORA = ("--peft", "lora", "--lora-rank", "2", "--lora-dropout", "0", "--lr", "1e-1")


class Counting(SampleView):
    """Sample k is k, k + 1, ...; six samples."""

    def __len__(self) -> int:
        return 6

    def sequence_length(self, k: int) -> int:
        return 3

    def fill(self, k: int, tokens: np.ndarray, marks: np.ndarray) -> int:
        tokens[:] = k + np.arange(len(tokens))
        return len(tokens) - 1


@pytest.mark.parametrize(("most", "count"), [(4, 4), (9, 6)])
def test_the_first_samples(most: int, count: int) -> None:
    view = FirstSamples(Counting(), most)
    tokens, marks, counts = np.zeros(4, np.int64), np.zeros(4, bool), np.ones(3, np.float32)
    assert len(view) == count and view.fill(count - 1, tokens, marks) == 3 and tokens[0] == count - 1
    assert view.fill(count, tokens, marks) == 0 and not tokens.any() and view.sequence_length(1) == 3
    view.weigh(count - 1, counts)
    assert counts.all()


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, float]:
    """Flags, the run of stage A, and what its last evaluation found."""
    folder = tmp_path_factory.mktemp("core")
    argv = dense_arguments(write_dataset(folder / "text"), "R-*-", "--eval-iters", "2", "--global-batch-size", "6")
    trainer = make_trainer([*argv, "--train-iters", "3", "--save", str(folder / "a")])
    trainer.train()
    assert trainer.last_evaluation is not None
    return argv, folder / "a", float(trainer.last_evaluation.values()["perplexity"])


def stage_b(argv: list[str], *more: str) -> Trainer:
    kept = [*argv, "--eval-iters", "0", "--global-batch-size", "8", "--train-iters", "4", "--stage", "b", *more]
    return make_trainer(kept)


def core_text(trainer: Trainer) -> CoreText:
    [found] = [one for one in trainer.callbacks if isinstance(one, CoreText)]
    return found


def test_adapters_that_are_reset_leave_the_core_as_it_was(
    core: tuple[list[str], Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another batch size; a run that is cut in two says the same."""
    argv, a, own = core
    trainer = stage_b(argv, "--load", str(a), *LORA)
    told = record(trainer)
    trainer.train()
    found, last = core_text(trainer), told.records[-1]
    assert found.before == found.reset == pytest.approx(own, rel=1e-6) and found.trained is not None
    assert abs(found.trained / own - 1) > 1e-3
    assert (last["core_perplexity_before"], last["core_perplexity"]) == (found.before, found.trained)
    assert "core_perplexity" not in told.records[0] and all(known("step", name) for name in last if "core" in name)
    said = capsys.readouterr()
    text = said.out + said.err
    assert f"perplexity {found.before:.5g} before stage B" in text
    assert f"{found.reset:.5g} with adapters reset, +0.00% beside the {own:.5g} before stage B, within 1%" in text
    flags = ("--load", str(a), "--save", str(tmp_path / "b"), *LORA)
    paused = stage_b(argv, *flags, "--exit-interval", "2")
    told = record(paused)
    paused.train()
    half = core_text(paused)
    assert (half.before, half.measured, told.records[-1]["core_perplexity"]) == (found.before, 2, half.trained)
    assert half.reset == found.reset and half.trained not in (None, found.trained)
    assert " after 2 steps of stage B, with adapters" in "".join(capsys.readouterr())
    flags = ("--load", str(tmp_path / "b"), "--save", str(tmp_path / "b"), *LORA)
    again = stage_b(argv, *flags)
    again.train()
    assert core_text(again).state() == found.state()
    for name, tensor in weights(trainer).items():
        assert bool((tensor == weights(again)[name]).all()), name


class AskedInStep(Requests):
    """Is asked to end in the second step."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._trainer = trainer

    def votes(self) -> list[float]:
        if self._trainer.iteration == 1:
            self.hear(signal.SIGTERM)
        return super().votes()


@pytest.mark.parametrize("last", [False, True])
def test_a_run_that_is_asked_to_end_leaves_it_to_the_next(
    core: tuple[list[str], Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str], last: bool
) -> None:
    """Where steps are left, at their end; where none is, at once; and once."""
    argv, a, _ = core
    steps = ("--train-iters", "2" if last else "4")
    whole = stage_b(argv, "--load", str(a), *LORA, *steps)
    whole.train()
    flags = (*LORA, *steps, "--save", str(tmp_path / "b"))
    first = stage_b(argv, "--load", str(a), *flags)
    first.train(AskedInStep(first))
    assert first.interrupted and first.iteration == 2 and core_text(first).trained is None
    assert "is not measured, as the run was asked to end (SIGTERM); the same line goes on" in "".join(
        capsys.readouterr()
    )
    second = stage_b(argv, "--load", str(tmp_path / "b"), *flags)
    measured = spy_on_predictions(second)
    second.train()
    assert core_text(second).state() == core_text(whole).state() and len(measured) == 2, "with adapters and without"
    assert " after stage B, with adapters" in "".join(capsys.readouterr())
    third = stage_b(argv, "--load", str(tmp_path / "b"), *flags)
    measured = spy_on_predictions(third)
    third.train()
    assert len(measured) == (2 if last else 0), "a checkpoint that has it need not be measured again"


def spy_on_predictions(trainer: Trainer) -> list[int]:
    """Iterations after which the trainer measured something."""
    found, own = [], trainer.predictions

    def noted(*args: Any) -> Any:
        found.append(trainer.iteration)
        return own(*args)

    trainer.predictions = noted  # type: ignore[method-assign]
    return found


def test_where_an_evaluation_ends_the_run_it_is_measured_before_the_checkpoint(
    core: tuple[list[str], Path, float], tmp_path: Path
) -> None:
    argv, a, _ = core
    more = ("--eval-iters", "1", "--eval-interval", "1", "--early-stopping-patience", "1", "--lr", "10")
    flags = ("--load", str(a), "--save", str(tmp_path / "b"), "--train-iters", "9", "--core-eval-iters", "1")
    trainer = stage_b(argv, *flags, *more)
    trainer.train()
    found = core_text(trainer)
    assert trainer.stop_reason is not None and 0 < found.measured == trainer.iteration < 9
    meta = read_meta(list_steps(tmp_path / "b")[0][1])
    assert meta["state"]["callbacks.core_text"] == found.state() and found.trained is not None


def test_a_core_that_is_trained_on_is_found_out(
    core: tuple[list[str], Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    argv, a, own = core
    trainer = stage_b(argv, "--load", str(a), "--lr", "10")
    trainer.train()
    found = core_text(trainer)
    assert found.reset == found.trained is not None and found.trained > 1.01 * own
    assert ", NOT within 1%" in "".join(capsys.readouterr())


def test_what_cannot_be_measured_is_said(
    core: tuple[list[str], Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, a, _ = core

    def said(*more: str, folder: Path = a) -> tuple[CoreText, str]:
        capsys.readouterr()
        trainer = stage_b(argv, "--load", str(folder), "--train-iters", "1", *more)
        trainer.train()
        return core_text(trainer), "".join(capsys.readouterr())

    found, text = said("--core-data-path", str(tmp_path / "gone"), *LORA)
    assert found.state() == {"before": None, "reset": None, "trained": None, "measured": 0}
    assert "the core's text is not measured: " in text and "gone" in text
    found, text = said("--core-eval-iters", "0", *LORA)
    assert found.trained is None and "core's text" not in text
    found, text = said("--peft", "bitfit")
    assert found.reset is None and found.trained is not None and "do not stand beside the weights" in text
    plain = make_trainer([*argv, "--eval-iters", "0", "--train-iters", "1", "--save", str(tmp_path / "p")])
    plain.train()
    found, text = said(folder=tmp_path / "p")
    assert found.trained is None and "measured nothing (--eval-iters 0); --core-eval-iters N measures it" in text
    found, text = said("--core-eval-iters", "1", folder=tmp_path / "p")
    assert found.trained is not None and math.isfinite(found.trained)


def test_flags_of_the_text() -> None:
    CoreTextConfig(core_eval_iters=0).validate()
    assert StageConfig().callbacks == () and StageConfig(stage="b").callbacks == ("core_text",)


def test_it_is_asked_for_where_there_is_a_stage_before(core: tuple[list[str], Path, float]) -> None:
    with pytest.raises(UserError, match="--core-eval-iters 3: .* in the section stage_b"):
        make_trainer([*core[0], "--core-eval-iters", "3"])
