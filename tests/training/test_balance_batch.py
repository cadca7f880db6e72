from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaforge.checkpoint.manifest import read_manifest
from megaforge.config.balancing import alike_ranks
from megaforge.config.check_layout import check_layout
from megaforge.data.dealing import Dealing
from megaforge.device import Clock
from megaforge.errors import UserError
from megaforge.monitor.events import read_events
from megaforge.training import balance_batch
from megaforge.training.balance_batch import BalanceBatch
from megaforge.training.callbacks import Callback
from megaforge.training.metrics import StepMetrics
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import MICRO, compare, flags, train
from tests.training.tiny import arguments, make_config, write_dataset

BALANCE = "--balance-batch"
RUN = (
    *MICRO,
    "--fp64",
    "--global-batch-size",
    "8",
    "--hidden-dropout",
    "0.1",
    "--eval-iters",
    "0",
    "--eval-interval",
    "0",
)


class Counting(Callback):
    """Keeps how many micro-batches each step had."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.counts.append(trainer.taken)


class Slow(Clock):
    """By it, micro-batches take 1 s on rank 0 and 3 s on rank 1."""

    trainer: Trainer

    def __init__(self, device: object) -> None:
        self.begins = False

    def now(self) -> float:
        self.begins = not self.begins
        return 0.0 if self.begins else self.trainer.taken * (1.0 + 2.0 * self.trainer.ctx.world.rank)


def dealt_run(argv: list[str], speeds: tuple[float, ...] | None, clock: type[Clock]) -> dict[str, Any]:
    """As :func:`train`, from these speeds on, and measured by a clock; and the micro-batches of each step."""
    counting, start = Counting(), Trainer.train

    def counted(trainer: Trainer, *args: Any) -> None:
        Slow.trainer = trainer
        trainer.add(counting)
        start(trainer, *args)

    with (
        mock.patch.object(Trainer, "train", counted),
        mock.patch.object(BalanceBatch, "_saved", speeds),
        mock.patch.object(balance_batch, "Clock", clock),
    ):
        return train(argv) | {"counts": counting.counts}


def test_uneven_parts_learn_the_same(ranks: RankPool, tmp_path: Path) -> None:
    """Loss, gradients, weights and moments, with experts, dropout, pipeline stages and ZeRO."""
    prefix = write_dataset(tmp_path / "train_text_document")
    expected = train(flags(prefix, *RUN))
    layout = ("--pp", "2", "--zero", "1", BALANCE)
    found = ranks.run(4, dealt_run, flags(prefix, *RUN, *layout, "--num-workers", "2"), (3.0, 1.0), Clock)
    assert [outcome["counts"] for outcome in found] == [[6, 6], [2, 2]] * 2
    compare(found, expected, 1e-10)


def test_a_slow_rank_takes_fewer(ranks: RankPool, tmp_path: Path) -> None:
    prefix, run = write_dataset(tmp_path / "train_text_document"), tmp_path / "run"
    steps = (*RUN, "--train-iters", "5", "--log-interval", "2")
    expected = train(flags(prefix, *steps))
    argv = flags(prefix, *steps, BALANCE, "--save", str(run), "--save-interval", "0", "--num-workers", "1")
    found = ranks.run(2, dealt_run, argv, None, Slow)
    # Batches that were begun before stay as they were.
    assert [outcome["counts"] for outcome in found] == [[4, 4, 4, 6, 6], [4, 4, 4, 2, 2]]
    compare(found, expected, 1e-10)
    (told,) = (one for one in read_events(run / "events.jsonl").events if one["kind"] == "balance")
    assert (told["micro_batches"], told["seconds"], told["expected"]) == ([6, 2], 12.0, 6.0)
    (path,) = run.glob("step_*")
    assert read_manifest(path).meta["state"]["callbacks.balance_batch"]["speeds"] == [1.0, pytest.approx(1 / 3)]


def test_what_is_worth_a_change() -> None:
    callback, trainer = BalanceBatch(1), mock.Mock()
    trainer.last_batch, trainer.config.training.micro_batch_size = 32, 2
    dealing = Dealing(4, span=2)
    callback.deal(trainer, dealing, [(rank, 1.0 + 0.02 * rank) for rank in range(4)])
    assert dealing.counts(16) == [4, 4, 4, 4] and not trainer.events.tell.called
    callback.deal(trainer, dealing, [(0, 1.0), (1, 1.0), (2, 1.0), (3, 3.0), (0, 0.5)])
    assert dealing.counts(16) == [6, 6, 2, 2], "a replica counts as its slowest rank, and those that share experts too"
    trainer.events.tell.assert_called_once_with("balance", micro_batches=[6, 6, 2, 2], seconds=12.0, expected=6.0)


@pytest.mark.parametrize(
    ("sizes", "span"), [((1, 1, 1), 1), ((1, 4, 1), 4), ((2, 4, 1), 2), ((2, 2, 2), 2), ((4, 2, 1), 1)]
)
def test_ranks_that_share_experts(sizes: tuple[int, int, int], span: int) -> None:
    assert alike_ranks(*sizes) == span


@pytest.mark.parametrize(
    ("more", "world", "text"),
    [
        (("--zero", "2"), 2, "--zero 2 reduces gradients behind every micro-batch"),
        (("--ep", "4"), 4, "with --ep 4 all 4 data-parallel ranks exchange tokens"),
    ],
)
def test_layouts_that_need_equal_parts(more: tuple[str, ...], world: int, text: str) -> None:
    with pytest.raises(UserError, match=f"--balance-batch.*{text}"):
        check_layout(make_config(arguments("data", BALANCE, *more)), world)


@pytest.mark.parametrize(
    ("more", "world", "text"),
    [
        ((), 1, "there is one data-parallel rank"),
        (("--global-batch-size", "4"), 2, "one micro-batch a step"),
        (("--ep", "2", "--global-batch-size", "16"), 4, None),
        (("--tp", "2", "--ep", "2", "--etp", "1"), 4, None),
    ],
)
def test_layouts_of_which_something_is_told(more: tuple[str, ...], world: int, text: str | None) -> None:
    notes = [
        note for note in check_layout(make_config(arguments("data", BALANCE, *more)), world).notes if BALANCE in note
    ]
    assert len(notes) == (text is not None) and (text is None or text in notes[0])
