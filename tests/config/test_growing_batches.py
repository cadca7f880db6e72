"""Under Megatron-LM's defaults, a schedule in iterations beside batches that grow counts samples, as there."""

from __future__ import annotations

import pytest

from megaforge.config.cli import ParsedConfig
from megaforge.config.lr_shapes import RateSettings
from tests.config.test_megatron_flags import gpt

STEPS = ("--train-iters", "100", "--step-batch-size-schedule", "0:4", "1K:16")


def settled(*argv: str) -> tuple[RateSettings | None, ParsedConfig]:
    parsed = gpt(*argv)
    return RateSettings.in_samples(parsed.config.optimizer, parsed.config.length), parsed


def test_an_iteration_is_a_full_batch() -> None:
    """``lr_decay_steps = lr_decay_iters * global_batch_size`` there, and a step counts the samples of its batch."""
    found, parsed = settled(*STEPS, "--lr-decay-iters", "90", "--lr-warmup-fraction", ".1")
    assert found is not None and (found.lr_decay_iters, found.lr_warmup_iters) == (1440, 144)
    assert parsed.origins["length.lr_decay_samples"] == "--lr-decay-iters 90 x 16 sequences, as in Megatron-LM"
    assert not any("counts steps" in note for note in parsed.notes) and parsed.config.training.train_iters == 100
    ramp = ("--train-iters", "100", "--global-batch-size", "8", "--rampup-batch-size", "2", "2", "90")
    found, _ = settled(*ramp, "--lr-warmup-iters", "5", "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "10")
    assert found is not None and (found.lr_decay_iters, found.lr_warmup_iters, found.lr_wsd_decay_iters) == (
        800,
        40,
        80,
    )


@pytest.mark.parametrize(
    "argv",
    [("--train-iters", "100", "--global-batch-size", "8"), (*STEPS, "--lr-warmup-epochs", "0.1", "--data-path", "a")],
)
def test_otherwise_it_counts_as_it_says(argv: tuple[str, ...]) -> None:
    assert settled(*argv)[0] is None
