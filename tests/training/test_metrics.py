"""The reported numbers against their definitions."""

from __future__ import annotations

import math

import pytest

from megaforge.training.metrics import EvaluationMetrics, StepMetrics, balance_entropy_bits


def test_evaluation_numbers() -> None:
    metrics = EvaluationMetrics(5, nats=20 * math.log(8), tokens=20, correct=5, text_bytes=60)
    assert metrics.loss == pytest.approx(math.log(8))
    assert metrics.perplexity == pytest.approx(8)
    assert metrics.bits_per_byte == pytest.approx(1.0), "three bits a token, three bytes a token"
    assert metrics.accuracy == 0.25
    assert set(metrics.values()) == {"loss", "perplexity", "bits_per_byte", "accuracy", "tokens"}


def test_unknown_numbers_are_left_out() -> None:
    assert set(EvaluationMetrics(1, 1.0, 1).values()) == {"loss", "perplexity", "tokens"}
    assert EvaluationMetrics(1, 1e6, 1).perplexity == math.inf


def test_balance_entropy() -> None:
    assert balance_entropy_bits([[5, 5, 5, 5]]) == 2.0
    assert balance_entropy_bits([[7, 0, 0, 0]]) == 0.0
    assert balance_entropy_bits([[1, 1, 0, 0], [1, 1, 1, 1]]) == 1.5
    assert balance_entropy_bits([]) == 0.0


def test_step_record_has_the_promised_keys() -> None:
    step = StepMetrics(3, 2.0, 1.0, 1e-3, 300, 3, 100, extra={"z_loss": 0.5}).after(0.5)
    assert step.values() == {
        "loss": 2.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 300,
        "consumed_samples": 3,
        "tokens_per_second": 200.0,
        "z_loss": 0.5,
    }
