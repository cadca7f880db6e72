"""Epochs and samples in iterations against a walk, batch by batch; runs of them, resumed, at another batch size."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.data.data_source import DataSource
from megaforge.errors import UserError
from megaforge.training.lengths import Progress, in_iterations, samples_of
from megaforge.training.second_stage import SecondStage
from megaforge.training.trainer import Trainer
from tests.training.tiny import arguments, make_config, make_trainer, record, write_dataset

CONSTANT_BATCH, RAMP = BatchSchedule(8), BatchSchedule(16, (4, 4, 60))


class Stages(DataSource):
    """Samples of 10 tokens, from the 30th on of 25."""

    def __init__(self, epoch: int = 1000) -> None:
        self.epoch = epoch

    @property
    def epoch_tokens(self) -> list[int]:
        return [self.epoch] if self.epoch else []

    def tokens_before(self, samples: int) -> int:
        return 10 * min(samples, 30) + 25 * max(samples - 30, 0)


@pytest.mark.parametrize("batches", [CONSTANT_BATCH, RAMP])
@pytest.mark.parametrize("done", [0, 3])
def test_progress_is_that_of_a_walk(batches: BatchSchedule, done: int) -> None:
    data, at = Stages(), [(0, 0)]
    for _ in range(60):
        samples = at[-1][1] + batches.size_at(at[-1][1])
        at.append((data.tokens_before(samples), samples))
    progress = Progress(data, batches, done, at[done][1])
    assert [progress.at(iteration) for iteration in range(61)] == at
    for tokens in range(1, 1500, 7):
        assert progress.first_at(tokens=tokens) == next(k for k, (read, _) in enumerate(at) if read >= tokens)
        samples = tokens % 300
        assert progress.first_at(samples=samples) == next(k for k, (_, read) in enumerate(at) if read >= samples)


def test_other_batches_and_other_data_before() -> None:
    """40 samples in 5 steps of 8 are behind; steps of 16 go on."""
    progress = Progress(Stages(), BatchSchedule(16), iteration=5, samples=40)
    assert progress.first_at(samples=72) == 7 and progress.at(7) == (300 + 25 * 42, 72)
    assert progress.first_at(samples=40) == 3, "the past counts as if its steps had been of 16"
    assert progress.first_at(samples=4) == 1
    short = Progress(Stages(), BatchSchedule(2), iteration=5, samples=40)
    assert short.first_at(samples=40) == 5, "what has been read needs no further step"
    other = Progress(Stages(), BatchSchedule(16), 5, 0, earlier_samples=40, earlier_tokens=9000)
    assert other.at(6) == (9160, 56) and other.first_at(samples=72) == 7 and other.first_at(tokens=9161) == 7


def test_samples_of_tokens() -> None:
    assert [samples_of(Stages(), tokens) for tokens in (-5, 0, 1, 10, 11, 300, 301, 326)] == [0, 0, 1, 1, 2, 30, 31, 32]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--train-epochs", "2"), {"train_iters": 13}),  # 300 tokens in 30 samples, 1700 in 68: 98 samples
        (("--train-epochs", "0.25"), {"train_iters": 4}),  # 250 tokens, 25 samples
        (("--train-epochs", "2", "--lr-warmup-epochs", "0.1"), {"train_iters": 13, "lr_warmup_iters": 2}),
        (("--train-samples", "98"), {"train_iters": 12}),  # as in Megatron-LM, what does not fill a batch stays
        (("--train-tokens", "2000"), {"train_iters": 12}),  # the first 30 samples are of 10 tokens, others of 25
        (("--train-tokens", "1949"), {"train_iters": 11}),
        (("--train-samples", "96", "--lr-warmup-samples", "9"), {"train_iters": 12, "lr_warmup_iters": 2}),
        (("--train-iters", "50", "--lr-decay-epochs", "2"), {"train_iters": 50, "lr_decay_iters": 13}),
        (
            ("--train-epochs", "2", "--lr-decay-style", "WSD", "--lr-wsd-decay-epochs", "1"),
            {"train_iters": 13, "lr_wsd_decay_iters": 5},  # the last 1000 of 2150 tokens
        ),
        (
            ("--train-iters", "20", "--lr-decay-style", "WSD", "--lr-wsd-decay-samples", "30"),
            {"lr_wsd_decay_iters": 3},
        ),
        (
            (
                *("--train-epochs", "2", "--lr-decay-style", "cosine-restarts", "--lr-restart-epochs", "0.5"),
                *("--lr-warmup-iters", "4"),
            ),
            {"lr_restart_iters": 3},  # from 350 tokens in 4 iterations to 850 in 7
        ),
    ],
)
def test_in_iterations(flags: tuple[str, ...], expected: dict[str, int]) -> None:
    config = make_config(["--seq-length", "10", "--global-batch-size", "8", *flags])
    found = in_iterations(config, Progress(Stages(), CONSTANT_BATCH))
    values = {**vars(found.training), **vars(found.optimizer)}
    assert {name: values[name] for name in expected} == expected
    assert in_iterations(found, Progress(Stages(), CONSTANT_BATCH)) == found, "once more changes nothing"


def test_lengths_that_do_not_fit_are_refused() -> None:
    progress = Progress(Stages(), CONSTANT_BATCH)
    with pytest.raises(UserError, match="--train-samples 7: fewer than one global batch; give at least 8"):
        in_iterations(make_config(["--train-samples", "7"]), progress)
    with pytest.raises(UserError, match="--train-tokens 79: fewer than one global batch; give at least 80"):
        in_iterations(make_config(["--train-tokens", "79"]), progress)
    late = make_config(["--train-epochs", "1", "--lr-warmup-epochs", "2"])
    with pytest.raises(UserError, match=r"--train-epochs 1 is 8 iter.*--lr-warmup-epochs 2 is 13 iter.*the decay is"):
        in_iterations(late, progress)
    in_iterations(make_config(["--train-epochs", "1", "--lr-warmup-epochs", "2", *CONSTANT]), progress)
    cycle = make_config(["--train-epochs", "1", "--lr-decay-style", "cosine-restarts"])
    with pytest.raises(UserError, match="add --lr-restart-iters"):
        in_iterations(cycle, progress)
    with pytest.raises(UserError, match=r"--train-epochs 1: the source of --data-path .* count in iterations"):
        in_iterations(make_config(["--train-epochs", "1"]), Progress(Stages(0), CONSTANT_BATCH))


CONSTANT = ("--lr-decay-style", "constant")


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [write_dataset(folder / "a"), write_dataset(folder / "b", documents=16, seed=1)]


def counted(prefix: str, *more: str) -> list[str]:
    """:func:`arguments` without their --train-iters."""
    line = arguments(prefix, *more)
    at = line.index("--train-iters")
    return [*line[:at], *line[at + 2 :]]


def test_an_epoch_reads_every_token_once(prefixes: list[str]) -> None:
    """Whole passes of one source; of a blend by size, about one of each; of another blend as it says."""
    one = make_trainer(counted(prefixes[0], "--train-epochs", "3", "--data-lanes", "1"))
    [epoch] = one.data.epoch_tokens
    steps, batch = one.config.training.train_iters, 8 * 24
    assert (steps - 1) * batch < 3 * epoch <= steps * batch
    read = [one.data.sample(k).cursor for k in range(-(-epoch // 24))]  # type: ignore[attr-defined]
    assert read == [24 * k for k in range(len(read))] and read[-1] < epoch <= read[-1] + 24

    for by_size in (True, False):
        sizes = [one.data.epoch_tokens[0], 900]
        weights = [str(size) for size in sizes] if by_size else ["1", "1"]
        blend = ("--data-path", weights[0], prefixes[0], weights[1], prefixes[1], "--train-epochs", "6")
        trainer = make_trainer(counted(prefixes[0], *blend))
        sizes, iterations = list(trainer.data.epoch_tokens), trainer.config.training.train_iters
        passes = trainer.data.passes(8 * iterations)
        assert sum(often * size for often, size in zip(passes, sizes, strict=True)) == pytest.approx(192 * iterations)
        ratio = int(weights[0]) / int(weights[1]) * sizes[1] / sizes[0]
        assert passes[0] / passes[1] == pytest.approx(ratio, rel=0.05)


def trained(line: list[str]) -> tuple[Trainer, list[dict[str, object]]]:
    trainer = make_trainer(line)
    recorder = record(trainer)
    trainer.train()
    return trainer, recorder.records


def test_a_run_in_epochs_is_resumed_and_goes_on_at_another_batch(
    prefixes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its evaluations and checkpoints come where the batches end that read the last of each half epoch."""
    epochs = ("--train-epochs", "1.5", "--lr-warmup-epochs", "0.25", "--lr-decay-style", "cosine", "--eval-iters", "1")
    every = ("--eval-interval-epochs", "0.5", "--save-interval-epochs", "0.5", "--keep-last", "0", "--keep-best", "1")
    line = counted(prefixes[1], *epochs, *every)
    whole, records = trained([*line, "--save", str(tmp_path / "whole")])
    [epoch] = whole.data.epoch_tokens
    assert f"an epoch is {epoch:,} training tokens" in capsys.readouterr().err
    ends = [-(-epoch * half // (2 * 192)) for half in (1, 2, 3)]
    assert whole.iteration == ends[-1] == whole.config.training.train_iters
    assert [r["iteration"] for r in records if r["kind"] == "evaluation"] == ends
    assert sorted(path.name for path in (tmp_path / "whole").glob("step_*")) == [f"step_{end:07}" for end in ends]

    own = ("--save", str(tmp_path / "parts"), "--load", str(tmp_path / "parts"))
    first, before = trained([*line, *own, "--exit-interval-epochs", "1"])
    assert first.iteration == ends[1] and first.stop_reason == "--exit-interval-epochs 1"
    again, after = trained([*line, *own])
    assert [*before, *after] == records

    capsys.readouterr()
    half = ("--load", str(tmp_path / "parts" / f"step_{ends[0]:07}"), "--save", str(tmp_path / "parts"))
    more = ("--global-batch-size", "4", *CONSTANT, "--override-opt_param-scheduler", "--train-epochs", "1")
    other = make_trainer([*line, *half, *more, "--second-stage-at", "0.5"])
    done = ends[0] + -(-(epoch - ends[0] * 192) // 96)
    assert (
        other.config.training.train_iters == done
        and f"--train-epochs 1 is {done:,} iterations" in capsys.readouterr().err
    )
    [stage] = [callback for callback in other.callbacks if isinstance(callback, SecondStage)]
    stage.on_train_start(other)
    assert stage.last_of_first == round(done / 2), "of the iterations that there are now"


def test_a_schedule_in_samples_goes_on_with_other_batches(
    prefixes: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """40 samples of warm-up are over when they are read, however many steps that takes; growing batches, too."""
    save = str(tmp_path / "run")
    linear = ("--lr-decay-style", "linear", "--train-samples", "107", "--lr-warmup-samples", "41", "--save", save)

    def expected(*samples: int) -> list[float]:
        return [1e-3 * (s / 41 if s <= 41 else (107 - s) / 66) for s in samples]

    first, records = trained(
        counted(prefixes[0], *linear, "--step-batch-size-schedule", "0:4 300:8", "--exit-interval", "3")
    )
    assert first.config.training.train_iters == 14 and first.consumed_samples == 12  # 3 x 4 and 11 x 8
    assert [record["lr"] for record in records] == pytest.approx(expected(4, 8, 12))
    assert records[-1]["global_batch_size"] == 4
    capfd.readouterr()
    second, records = trained(counted(prefixes[0], *linear, "--load", save, "--global-batch-size", "16"))
    said = capfd.readouterr().err
    assert "rate was" not in said and "--step-batch-size-schedule ['0:4 300:8'] in the checkpoint, [] here" in said
    assert second.iteration == 8 and second.consumed_samples == 12 + 5 * 16
    assert [record["lr"] for record in records] == pytest.approx(expected(28, 44, 60, 76, 92))
