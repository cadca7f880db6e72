from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaforge.config.resilience_config import ResilienceConfig
from megaforge.resilience.last_words import LastWords
from megaforge.training.watching import Watching
from tests.training.tiny import arguments, make_trainer, write_dataset


class Dog:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.on_hang: Any = None

    def tell(self, phase: str) -> None:
        self.told.append(phase)


def test_a_run_tells_what_it_does(tmp_path: Path) -> None:
    dog = Dog()
    flags = ("--train-iters", "2", "--eval-iters", "2", "--save", str(tmp_path))
    trainer = make_trainer(arguments(write_dataset(tmp_path / "data"), *flags))
    trainer.add(Watching(dog))  # type: ignore[arg-type]
    trainer.train()
    step = ["batch of step {}", "step {}: forward and backward", "step {}: update"]
    first, second = ([phase.format(number) for phase in step] for number in (1, 2))
    last = ["evaluation after step 2"] * 2 + ["save after step 2", "batch of step 3", "end"]
    saved = ["save after step 1"]  # a tenth of the run
    assert dog.told == [*first, *saved, *second, *last]

    dog.on_hang({0: LastWords(0, "here", "end")}, ["it waits in 'end'"])
    event = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (event["kind"], event["meaning"], event["iteration"]) == ("hang", ["it waits in 'end'"], 2)
    assert event["ranks"] == {"0": "rank 0 on here: end; last collective: none that was recorded; at unknown"}


@pytest.mark.parametrize(
    ("minutes", "ranks", "seconds"), [(None, 1, 0.0), (None, 2, 300.0), (0.0, 2, 0.0), (0.1, 2, 6.0), (0.5, 1, 30.0)]
)
def test_when_a_run_counts_as_hung(minutes: float | None, ranks: int, seconds: float) -> None:
    assert ResilienceConfig(minutes).hang_seconds(10.0, ranks) == pytest.approx(seconds)
