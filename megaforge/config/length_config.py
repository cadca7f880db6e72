"""Flags of lengths and intervals that are counted in epochs, samples or tokens instead of iterations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaforge.config.fields import flag

_MOST = 100_000  # epochs; more is a slip of the pen

# Settings that count iterations, and those here that say the same in epochs, samples or tokens.
LENGTHS: Mapping[str, tuple[str, ...]] = {
    "training.train_iters": ("train_epochs", "train_samples", "train_tokens"),
    "optimizer.lr_warmup_iters": ("lr_warmup_epochs", "lr_warmup_samples"),
    "optimizer.lr_decay_iters": ("lr_decay_epochs", "lr_decay_samples"),
    "optimizer.lr_wsd_decay_iters": ("lr_wsd_decay_epochs", "lr_wsd_decay_samples"),
    "optimizer.lr_restart_iters": ("lr_restart_epochs",),
    "qat.quant_lambda_start_iters": ("quant_lambda_start_epochs",),
    "qat.quant_lambda_end_iters": ("quant_lambda_end_epochs",),
}
INTERVALS: Mapping[str, tuple[str, ...]] = {
    "training.eval_interval": ("eval_interval_epochs",),
    "training.exit_interval": ("exit_interval_epochs",),
    "checkpoint.save_interval": ("save_interval_epochs",),
}


@dataclass(frozen=True)
class LengthConfig:
    """Lengths and intervals in epochs of the training data, in samples or in tokens, instead of iterations."""

    train_epochs: float | None = flag(
        None, "instead of --train-iters: passes over the training data", above=0, most=_MOST
    )
    train_samples: int | None = flag(None, "instead of --train-iters: samples to train on", least=1)
    train_tokens: int | None = flag(None, "instead of --train-iters: tokens to train on", least=1)
    lr_warmup_epochs: float | None = flag(
        None, "instead of --lr-warmup-iters: epochs of linear warm-up", above=0, most=_MOST
    )
    lr_warmup_samples: int | None = flag(None, "instead of --lr-warmup-iters: samples of linear warm-up", least=1)
    lr_decay_epochs: float | None = flag(
        None, "instead of --lr-decay-iters: epochs until --min-lr", above=0, most=_MOST
    )
    lr_decay_samples: int | None = flag(None, "instead of --lr-decay-iters: samples until --min-lr", least=1)
    lr_wsd_decay_epochs: float | None = flag(
        None, "instead of --lr-wsd-decay-iters: epochs of WSD's final decay", above=0, most=_MOST
    )
    lr_wsd_decay_samples: int | None = flag(
        None, "instead of --lr-wsd-decay-iters: samples of WSD's final decay", least=1
    )
    lr_restart_epochs: float | None = flag(
        None, "instead of --lr-restart-iters: epochs of the first cycle of cosine-restarts", above=0, most=_MOST
    )
    eval_interval_epochs: float | None = flag(
        None, "instead of --eval-interval: epochs between evaluations", above=0, most=_MOST
    )
    save_interval_epochs: float | None = flag(
        None, "instead of --save-interval: epochs between checkpoints", above=0, most=_MOST
    )
    quant_lambda_start_epochs: float | None = flag(
        None, "instead of --quant-lambda-start-iters: epochs before lambda begins to grow", above=0, most=_MOST
    )
    quant_lambda_end_epochs: float | None = flag(
        None, "instead of --quant-lambda-end-iters: epochs until lambda is 1", above=0, most=_MOST
    )
    exit_interval_epochs: float | None = flag(
        None, "instead of --exit-interval: save and leave each time so many more epochs are read", above=0, most=_MOST
    )

    @property
    def needs_data(self) -> bool:
        """Whether iterations of the run or of its schedule are known only once the data are open."""
        return any(getattr(self, name) is not None for names in LENGTHS.values() for name in names)

    @property
    def given(self) -> dict[str, float]:
        """What is set, by its flag."""
        names = [name for names in (*LENGTHS.values(), *INTERVALS.values()) for name in names]
        return {f"--{name.replace('_', '-')}": value for name in names if (value := getattr(self, name)) is not None}

    def validate(self) -> None:
        """The fields' bounds are all there is to check; :mod:`megaforge.config.lengths` sees what excludes what."""
