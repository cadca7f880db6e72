"""Hidden inputs: the share that was asked for, in spans of the length that was, and labels that never change."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.data.augment.augmentation import Augmentation, token_id, uniform
from megaforge.data.augment.hiding import HiddenInputs
from megaforge.data.augment.source import AugmentedSource, augmentations_of, augmented
from megaforge.data.loader import GlobalBatchLoader
from megaforge.data.skipped import SkippedSamples
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.registry import AUGMENTATIONS
from tests.toys.counting_source import Counting

MASK = 63


@pytest.mark.parametrize(("rate", "length"), [(0.15, 3.0), (0.5, 1.0), (0.9, 8.0), (0.02, 40.0)])
def test_spans(rate: float, length: float) -> None:
    """Their share and mean length; one of 9/10 needs longer ones than were asked for, as they do not touch."""
    hidden = [HiddenInputs(1, MASK, rate, length, 0.0).shown(k, np.zeros(2000, np.int64)) == MASK for k in range(100)]
    assert np.mean(hidden) == pytest.approx(rate, rel=4 * (length / rate / 200_000) ** 0.5)
    runs = [sum(run) for row in hidden for on, run in itertools.groupby(row.tolist()) if on]
    assert np.mean(runs) == pytest.approx(max(length, rate / (1 - rate)), rel=0.15)
    assert np.mean([row[0] for row in hidden]) == pytest.approx(rate, abs=0.13), "the first place is like any other"


def test_dropout_and_labels() -> None:
    source = AugmentedSource(Counting(3, 400), [HiddenInputs(1, MASK, 0.0, 3.0, 0.25)])
    for micro, dp in ((1, 1), (2, 1), (1, 2)):
        loaders = [GlobalBatchLoader(source, BatchSchedule(2), micro, rank, dp) for rank in range(dp)]
        batches = [batch for loader in loaders for batch in next(iter(loader))]
        rows = [row for batch in batches for row in zip(batch.tokens, batch.labels, strict=True)]
        for k, (tokens, labels) in enumerate(rows):
            plain = (k + 3 * np.arange(401)) % 64
            assert labels.tolist() == plain[1:].tolist(), "labels are never hidden"
            changed = tokens.numpy() != plain[:-1]
            assert (tokens.numpy()[changed] == MASK).all() and 0.15 < changed.mean() < 0.35
            assert tokens.tolist() == source.shown(k, plain[:-1]).tolist()
    left = SkippedSamples(source)
    left.leave_out([(0, 5)])
    assert left.shown(0, np.arange(9)).tolist() == source.shown(5, np.arange(9)).tolist()
    assert source.shown(0, np.arange(0)).tolist() == []


def test_flags() -> None:
    given = ["--span-mask-rate", "0.1", "--token-dropout", "0.2", "--mask-token", "7"]
    (found,) = augmentations_of(parse_config(given).config, None)
    assert list(found.state().values()) == [0.1, 3.0, 0.2, 7]
    with pytest.raises(UserError, match="--mask-token: no token is named, and there is no --tokenizer-model"):
        augmentations_of(parse_config(given[:4]).config, None)
    with pytest.raises(UserError, match="--span-mask-rate 1.0: must be at least 0 and below 1"):
        parse_config(["--span-mask-rate", "1.0"])
    with pytest.raises(UserError, match="--mask-token 9: the model's vocabulary has ids 0..8"):
        token_id("--mask-token", "9", (), None, 9)


def test_uniform_numbers() -> None:
    drawn = uniform(10_000, "a", 1)
    assert drawn.min() >= 0 and drawn.max() < 1 and drawn.mean() == pytest.approx(0.5, abs=0.02)
    assert uniform(5, "a", 1).tolist() == drawn[:5].tolist() != uniform(5, "a", 2).tolist()


def test_an_augmentation_of_a_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is registered, decides by the flags whether it is asked for, and comes after ours."""

    class Upwards(Augmentation):
        @classmethod
        def of(cls, config: Config, tokenizer: Tokenizer | None) -> Augmentation | None:
            return cls() if config.training.seed == 5 else None

        def shown(self, k: int, inputs: np.ndarray) -> np.ndarray:
            return inputs + 1

        def state(self) -> dict[str, Any]:
            return {"upwards": 1}

    monkeypatch.setattr(AUGMENTATIONS, "_parts", {**AUGMENTATIONS._parts})
    AUGMENTATIONS.register("upwards", Upwards)
    source = augmented(Counting(3, 8), parse_config(["--seed", "5"]).config, None)
    assert source.shown(0, np.arange(3)).tolist() == [1, 2, 3] and source.state(0)["augmentation"] == {"upwards": 1}
    assert augmentations_of(parse_config([]).config, None) == []
