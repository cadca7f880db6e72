from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megaforge.monitor.events import read_events
from megaforge.monitor.wait_sampler import WaitSampler
from megaforge.training.callbacks import Callback
from megaforge.training.stragglers import Load, Stragglers
from megaforge.training.trainer import Trainer
from tests.monitor.looks import Looks
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, write_dataset


class Told:
    """Stands for a trainer whose events are written down."""

    def __init__(self) -> None:
        self.events, self.told = self, list[dict[str, Any]]()

    def tell(self, kind: str, **fields: Any) -> None:
        self.told.append({"kind": kind, **fields})


def loads(*work: float, looks: int = 100) -> list[Load]:
    return [Load(f"node{rank}", 10, seconds, 4.0 - seconds, looks) for rank, seconds in enumerate(work)]


def test_a_rank_is_told_of_once_and_once_again(capsys: pytest.CaptureFixture[str]) -> None:
    told, callback = Told(), Stragglers(1.5, 10)
    report = lambda *work, **how: callback.report(told, loads(*work, **how))  # type: ignore[arg-type]  # noqa: E731
    assert report(1.0, 1.1, 3.0, looks=3) == {} and not told.told, "too few looks"
    assert report(1.0, 1.0, 1.5, 1.0) == {"slowest_rank": 1.5, "wait_share": 0.7188} and not told.told, "not above it"
    assert report(1.0, 1.0, 3.0, 1.0)["slowest_rank"] == 3.0
    report(1.0, 1.0, 3.2, 1.0)
    assert told.told == [
        {"kind": "straggler", "rank": 2, "host": "node2", "slow": True, "factor": 3.0}
        | {"work": 0.3, "median": 0.1, "wait": 0.1}
    ]
    report(1.0, 1.0, 1.0, 1.0)
    assert told.told[1:] == [{"kind": "straggler", "rank": 2, "host": "node2", "slow": False}]
    uneven = [load._replace(micro_batches=count) for load, count in zip(loads(3.0, 1.0), (24, 8), strict=True)]
    assert callback.report(told, uneven)["slowest_rank"] == 1.0, "as much for each micro-batch"  # type: ignore[arg-type]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "rank 2 on node2 is slow: 3.0 times the ranks' median of own work (300.0 ms a step against 100.0 ms; it waits "
        "100.0 ms for others, the others 300.0 ms)",
        "rank 2 on node2 is as fast as the others again",
    ]
    assert report(0.0, 0.0)["slowest_rank"] == 0.0, "nothing was measured"


class Slow(Callback):
    """Gives time to a step, by the trainer's clock: each takes 80 ms. The second rank works as long, the first for
    20 ms, and waits for the rest."""

    def __init__(self) -> None:
        self.seconds, self.looks = 0.0, Looks()

    def on_step_start(self, trainer: Trainer) -> None:
        self.seconds += 0.08
        works = 4 if trainer.ctx.world.rank == 1 else 1
        self.looks.at_work(works)
        self.looks.waiting(4 - works)


def run(argv: list[str]) -> dict[int, float]:
    trainer, slow = trainer_of(argv), Slow()
    (callback,) = (one for one in trainer.callbacks if isinstance(one, Stragglers))
    trainer.add(slow)
    trainer.now, callback.new_sampler = lambda: slow.seconds, lambda: WaitSampler(slow.looks.rest)
    trainer.train()
    return callback.slow


def test_a_rank_that_works_longer_is_slow(ranks: RankPool, tmp_path: Path) -> None:
    steps = ("--train-iters", "18", "--log-interval", "6", "--save", str(tmp_path / "run"))
    argv = arguments(write_dataset(tmp_path / "train_text_document"), *steps)
    assert ranks.run(2, run, argv) == [{1: pytest.approx(4.0)}, {1: pytest.approx(4.0)}]
    (event,) = (one for one in read_events(tmp_path / "run" / "events.jsonl").events if one["kind"] == "straggler")
    named = {name: event[name] for name in ("rank", "iteration", "slow", "factor", "work", "median", "wait")}
    where = {"rank": 1, "iteration": 18, "slow": True}  # six steps have 24 looks, which are too few, as 48 are
    assert named == where | {"factor": 4.0, "work": 0.08, "median": 0.02, "wait": 0.0}
