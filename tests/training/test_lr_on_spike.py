"""A lower learning rate behind spikes: what one is, how the factor fades, that a resumed run goes on alike."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megaforge.monitor import spikes
from megaforge.monitor.spikes import is_spike
from megaforge.training.lr_on_spike import REPEAT, ReduceOnSpike
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.training.tiny import arguments, make_trainer, record, write_dataset


def feed(callback: ReduceOnSpike, losses: list[float], norms: list[float] | None = None) -> list[float]:
    """The factor of each step."""
    factors: list[float] = []
    trainer: Any = SimpleNamespace(lr_factors={}, iteration=0)
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        callback.on_step_start(trainer)
        during = trainer.lr_factors["spike"]
        metrics: Any = SimpleNamespace(loss=loss, grad_norm=norm, iteration=len(factors) + 1, extra={})
        callback.on_step_end(trainer, metrics)
        factors.append(metrics.extra["spike_lr_factor"])
        assert factors[-1] == during
        assert not trainer.lr_factors, "a checkpoint that goes on without the flag is at the scheduled rate"
    return factors


def test_what_a_spike_is() -> None:
    steady = [2.0, 2.01, 1.99, 2.0, 2.02, 1.98]
    assert not is_spike(2.1, steady, 0.1) and is_spike(2.3, steady, 0.1)  # a tenth of the median at least
    wide = [1.0, 2.0, 3.0, 4.0, 5.0]  # median 3, median absolute deviation 1
    assert not is_spike(3 + 6 * 1.48, wide, 0.1) and is_spike(3 + 6 * 1.49, wide, 0.1)
    assert not is_spike(0.0, steady, 0.1) and not is_spike(2.0, [2.0] * 8, 0.1)
    assert is_spike(-1.0, [-2.0] * 8, 0.1) and not is_spike(math.nan, steady, 0.1)


def test_the_factor_holds_and_fades() -> None:
    factors = feed(ReduceOnSpike(0.25, 20), [2.0] * 10 + [9.0] + [2.0] * 25)
    assert factors[:11] == [1.0] * 11, "the step of the spike itself is over when it is seen"
    expected = [0.25 ** ((20 - k) / 20) for k in range(20)]
    assert factors[11:31] == pytest.approx(expected, rel=1e-12)
    assert factors[31:] == [1.0] * 5
    by_norm = feed(ReduceOnSpike(0.25, 20), [2.0] * 36, [1.0] * 10 + [9.0] + [1.0] * 25)
    assert by_norm == factors
    early = feed(ReduceOnSpike(0.25, 20), [2.0] * 4 + [9.0] + [2.0] * 5)
    assert early == [1.0] * 10, "too few steps to tell"
    assert feed(ReduceOnSpike(0.25, 20), [2.0] * 10 + [math.nan, math.inf] + [2.0] * 5) == [1.0] * 17


def test_spikes_that_follow_each_other() -> None:
    losses = [2.0] * 10 + ([9.0] + [2.0] * REPEAT) * 5
    factors = feed(ReduceOnSpike(0.5, 40), losses)
    assert min(factors) >= 0.5**3 and min(factors) < 0.5**2
    assert factors[12] > 0.49, "a second spike at once changes nothing"
    level = feed(ReduceOnSpike(0.5, 16), [2.0] * 16 + [9.0] * 60)
    assert level[-1] == 1.0, "a level that stays is the usual one"


def test_a_run_goes_on_in_the_middle_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some step of a run this short becomes a spike where little is enough.
    monkeypatch.setattr("megaforge.monitor.spikes.SIGMAS", -1e9)
    monkeypatch.setattr("megaforge.monitor.spikes.LEAST", {"loss": -0.5, "grad_norm": -0.5})
    prefix = write_dataset(tmp_path / "a_text_document")
    line = arguments(prefix, "--lr-on-spike", "0.5", "--lr-spike-window", "8", "--train-iters", "8")
    whole = make_trainer([*line, "--save", str(tmp_path / "run"), "--save-interval", "5"])
    recorder = record(whole)
    whole.train()
    assert any(entry["spike"] for entry in recorder.records[:5]), "a spike before the checkpoint"
    assert any(entry["spike_lr_factor"] < 1 for entry in recorder.records[5:])
    again = make_trainer([*line, "--load", str(tmp_path / "run" / "step_0000005")])
    rest = record(again)
    again.train()
    assert rest.records == recorder.records[5:]


def train_touchily(argv: list[str]) -> dict[str, Any]:
    """Some step of a run this short becomes a spike where little is enough: here, beyond the median."""
    with mock.patch.multiple(spikes, SIGMAS=0.0, LEAST={"loss": 0.0, "grad_norm": 0.0}):
        return train(argv)


def test_spikes_are_the_same_at_every_layout(ranks: RankPool, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    argv = arguments(prefix, "--fp64", "--micro-batch-size", "1", "--train-iters", "6")
    argv += ["--lr-on-spike", "0.5", "--lr-spike-window", "8"]
    expected = train_touchily(argv)
    assert [step["spike_lr_factor"] < 1 for step in expected["records"]].count(True) >= 2
    compare(ranks.run(4, train_touchily, [*argv, "--tp", "2", "--sp", "--zero", "2"]), expected, 1e-9)
