"""From epochs and samples to iterations, once the data are open.

An epoch is as many tokens as the training parts of all sources have together. Global batches are whole, so a length
ends with the first step by which all of it has been read.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.check_layout import check_schedule, warmup_notes
from megaforge.config.config import Config
from megaforge.config.length_config import INTERVALS, LENGTHS
from megaforge.config.lr_shapes import RateShape
from megaforge.data.data_source import DataSource
from megaforge.errors import UserError
from megaforge.registry import LR_SCHEDULES
from megaforge.training.intervals import Interval

_ENDLESS = 1 << 62  # samples that no run reads


@dataclass(frozen=True)
class Progress:
    """What has been read after each iteration of a run.

    Attributes:
        iteration, samples: steps done, and samples of ``data`` that they read; the next batches are of ``batches``. Of
            steps before, where they matter, it is taken that they had the batches of now.
        earlier_samples, earlier_tokens: of other data, read before (``--reset-data``).
    """

    data: DataSource
    batches: BatchSchedule
    iteration: int = 0
    samples: int = 0
    earlier_samples: int = 0
    earlier_tokens: int = 0

    def at(self, iteration: int) -> tuple[int, int]:
        """(tokens, samples) read after ``iteration``, from the run's beginning."""
        if iteration < self.iteration:
            return self._anew().at(iteration)
        samples = self.batches.samples_after(iteration - self.iteration, self.samples)
        return self.data.tokens_before(samples) + self.earlier_tokens, samples + self.earlier_samples

    def first_at(self, tokens: Fraction | int = 0, samples: int = 0) -> int:
        """The first iteration after which as many ``tokens`` and ``samples`` have been read."""
        of_tokens = samples_of(self.data, ceil(tokens) - self.earlier_tokens) if tokens else 0
        needed = max(of_tokens, samples - self.earlier_samples)
        if needed > self.samples or not self.iteration:
            return self.iteration + self.batches.steps_until(needed, self.samples)
        return min(self.iteration, self._anew().first_at(tokens, samples))

    def _anew(self) -> Progress:
        return Progress(self.data, dataclasses.replace(self.batches, before=0))


def check_end(train_iters: int, progress: Progress) -> None:
    """
    Raises:
        UserError: the data end before the run.
    """
    end = progress.data.end
    needed = progress.batches.samples_after(max(0, train_iters - progress.iteration), progress.samples)
    if end is not None and needed > end:
        raise UserError(
            f"--train-iters {train_iters} reads {needed:,} samples, and after {end:,} every source has been read as "
            "often as max_epochs of --data-schedule allows: make the run shorter, raise max_epochs, or add data"
        )


def samples_of(data: DataSource, tokens: int) -> int:
    """The fewest samples of ``data`` that hold so many tokens."""
    most = 1
    while data.tokens_before(most) < tokens:
        most *= 2
        if most > _ENDLESS:
            raise UserError(f"the data source gives {data.tokens_before(most):,} tokens in {most:,} samples")
    return bisect_left(range(most), tokens, key=data.tokens_before)


def epoch_tokens(config: Config, data: DataSource) -> int:
    """Training tokens of one epoch.

    Raises:
        UserError: the data have no end.
    """
    tokens = sum(data.epoch_tokens)
    if not tokens:
        flag, value = next((flag, value) for flag, value in config.length.given.items() if flag.endswith("-epochs"))
        raise UserError(
            f"{flag} {value:g}: the source of --data-path {' '.join(config.data.data_path)} does not say how many "
            "tokens an epoch has (epoch_tokens); count in iterations (--train-iters) or samples (--train-samples)"
        )
    return tokens


def interval(config: Config, data: DataSource, key: str) -> Interval:
    """The interval that the setting ``key`` (``section.name``) has, in iterations or in epochs."""
    [name] = INTERVALS[key]
    epochs = getattr(config.length, name)
    if epochs is not None:
        return Interval(tokens=_exactly(epochs) * epoch_tokens(config, data))
    section, field = key.split(".")
    return Interval(getattr(getattr(config, section), field) or 0)


def in_iterations(config: Config, progress: Progress) -> Config:
    """``config`` with every length of the section ``length`` in iterations too, where those that count iterations
    stand. The same where it has been done before.

    Raises:
        UserError: the data have no end, or the lengths do not fit each other.
    """
    if not config.length.needs_data:
        return config
    counted: dict[str, int] = {}
    for key, names in LENGTHS.items():
        for name in (name for name in names if getattr(config.length, name) is not None):
            counted[key] = _count(config, progress, name)
            section, field = key.split(".")
            changed = dataclasses.replace(getattr(config, section), **{field: counted[key]})
            config = dataclasses.replace(config, **{section: changed})
    try:
        config.qat.validate()
        check_schedule(config)
        _check_warmup(config)
    except UserError as error:
        raise UserError(f"{'; '.join(_counts(config))}: {error}") from error
    return config


def _count(config: Config, progress: Progress, name: str) -> int:
    """The iterations of one setting; those of the run, then those of the schedule's parts before it are known."""
    value, optimizer = getattr(config.length, name), config.optimizer
    by_tokens = name.endswith("_epochs")
    amount = _exactly(value) * epoch_tokens(config, progress.data) if by_tokens else Fraction(value)

    def first_at(read: Fraction) -> int:
        return progress.first_at(tokens=read) if by_tokens else progress.first_at(samples=ceil(read))

    def read_at(iteration: int) -> int:
        tokens, samples = progress.at(iteration)
        return tokens if by_tokens else samples

    if name.startswith("lr_wsd_decay"):  # the last of the schedule
        end = optimizer.lr_decay_iters or config.training.train_iters
        return max(1, end - first_at(read_at(end) - amount))
    if name.startswith("lr_restart"):  # begins behind the warm-up
        whole = optimizer.lr_decay_iters or config.training.train_iters
        start = optimizer.lr_warmup_iters or int(whole * optimizer.lr_warmup_fraction)
        return max(1, first_at(read_at(start) + amount) - start)
    if name in ("train_samples", "train_tokens"):
        return _whole_steps(progress, name.removeprefix("train_"), int(value))
    return first_at(amount)


def _whole_steps(progress: Progress, unit: str, asked: int) -> int:
    """The most iterations that read no more than so many ``samples`` or ``tokens``, as Megatron-LM has it.

    Raises:
        UserError: there is none.
    """
    column = ("tokens", "samples").index(unit)
    count = progress.first_at(**{unit: asked})
    count -= progress.at(count)[column] > asked
    if count < 1:
        raise UserError(f"--train-{unit} {asked}: fewer than one global batch; give at least {progress.at(1)[column]}")
    return count


def _exactly(number: float) -> Fraction:
    """As it was written: a tenth is 1/10, so that ten of them are one."""
    return Fraction(repr(number))


def _check_warmup(config: Config) -> None:
    length, optimizer = config.length, config.optimizer
    if length.lr_warmup_epochs is None and length.lr_warmup_samples is None:
        return
    shape: RateShape = LR_SCHEDULES.get(optimizer.lr_decay_style)
    end = optimizer.lr_decay_iters or config.training.train_iters
    if "lr_decay_iters" in shape.reads and end <= optimizer.lr_warmup_iters:
        raise UserError(
            f"the decay is over after {end} iterations, when the warm-up of {optimizer.lr_warmup_iters} ends: make the "
            "one longer or the other shorter"
        )


def _counts(config: Config) -> Iterator[str]:
    for key, names in LENGTHS.items():
        section, field = key.split(".")
        for name in (name for name in names if getattr(config.length, name) is not None):
            flag, value = f"--{name.replace('_', '-')}", getattr(config.length, name)
            yield f"{flag} {value:g} is {getattr(getattr(config, section), field):,} iterations"


def described(config: Config, data: DataSource, progress: Progress) -> list[str]:
    """What to tell of lengths and intervals in epochs and samples."""
    lines = warmup_notes(config) if config.length.needs_data else []
    if any(flag.endswith("-epochs") for flag in config.length.given):
        tokens = epoch_tokens(config, data)
        batch = f"{tokens / max(1, data.tokens_before(progress.batches.size)):,.1f} global batches"
        lines.append(f"an epoch is {tokens:,} training tokens, {batch}")
        passes = data.passes(progress.at(config.training.train_iters)[1] - progress.earlier_samples)
        if len(passes) > 1:
            often = ", ".join(f"{one:.2f}" for one in passes)
            lines.append(f"the run reads the sources of --data-path, in their order, {often} times")
    return [*lines, *(["; ".join(_counts(config))] if config.length.needs_data else [])]
