"""What a person sees of a run: one line every ``--log-interval`` iterations, and a live line on a terminal."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megaforge.config.launcher import SAID
from megaforge.parallel.layer_context import compute_dtype
from megaforge.training.callbacks import Callback, Place
from megaforge.training.metrics import EvaluationMetrics, StepMetrics
from megaforge.training.speed import Speed

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer

logger = logging.getLogger(SAID)

_BAR = 24
_LIVE_SECONDS = 0.1  # between redraws of the live line


class Interval:
    """The steps since the last line: their time and tokens, the means of their numbers, and the newest of them."""

    last: StepMetrics

    def __init__(self) -> None:
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, step: StepMetrics) -> None:
        """Takes in one more step."""
        self.last = step
        self.steps += 1
        self.tokens += step.step_tokens
        self.seconds += step.seconds
        for name, value in step.values().items():
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def mean(self, name: str) -> float:
        """Of a number, over the steps where it was finite (a step that overflowed has no loss); nan if none was."""
        return self._sums[name] / self._counts[name] if name in self._sums else math.nan


class ConsoleLog(Callback):
    """Prints on the first rank. A line tells of the whole interval: means of its steps.

    On a terminal a line that is too wide leaves out its least important parts; a file gets them all.
    """

    place = Place.SHOW

    def __init__(self, interval: int, speed: Speed, stream: TextIO | None = None) -> None:
        self.interval = interval
        self.speed = speed
        self.stream = sys.stdout if stream is None else stream
        self._shows = logger.isEnabledFor(logging.INFO) or logging.getLogger("megaforge").level == logging.NOTSET
        self.live = self.stream.isatty() and self._shows
        self._interval = Interval()
        self._mean_step = 0.0
        self._drawn = -math.inf

    def on_train_start(self, trainer: Trainer) -> None:
        self._print(trainer, describe(trainer, self.speed.parameters, self.speed.trained_share))
        peak, each = _si(self.speed.peak, "FLOP/s"), _si(self.speed.flops_per_token, "FLOP")
        dtype = compute_dtype(trainer.config.training)
        self._print(trainer, f"a token costs {each}; matrix products reach {peak} here in {str(dtype)[6:]}")
        if trainer.iteration:
            self._print(trainer, f"continuing after iteration {trainer.iteration}")
        if trainer.finished and trainer.stop_reason is None:
            self._print(trainer, f"nothing left to do: --train-iters {trainer.config.training.train_iters} is reached")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if not trainer.ctx.is_first_rank:
            return
        self._interval.add(metrics)
        self._mean_step = metrics.seconds if not self._mean_step else 0.9 * self._mean_step + 0.1 * metrics.seconds
        total = trainer.config.training.train_iters
        if metrics.iteration % self.interval == 0 or trainer.finished:
            self._print(trainer, self._line(total, self._width()))
            self._interval = Interval()
        elif self.live and time.monotonic() - self._drawn >= _LIVE_SECONDS:
            bar = f"{_bar(metrics.iteration / total)} "
            self.stream.write(f"\r\x1b[2K{bar}{self._line(total, self._width() - len(bar))}")
            self.stream.flush()
            self._drawn = time.monotonic()

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        self._evaluated(trainer, metrics, "evaluation")

    def on_test(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        self._evaluated(trainer, metrics, "test")

    def _evaluated(self, trainer: Trainer, metrics: EvaluationMetrics, what: str) -> None:
        parts = [f"{what} at iteration {metrics.iteration}: loss {metrics.loss:.4f}"]
        parts.append(f"perplexity {metrics.perplexity:,.2f}")
        if metrics.bits_per_byte is not None:
            parts.append(f"{metrics.bits_per_byte:.4f} bits per byte")
        if metrics.accuracy is not None:
            parts.append(f"accuracy {100 * metrics.accuracy:.1f} %")
        parts += [f"{name} {value:.4g}" for name, value in metrics.extra.items()]
        self._print(trainer, " | ".join([*parts, f"{metrics.tokens:,} tokens"]))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self._print(trainer, f"saved {path}")

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.stop_reason is not None:
            lost = "" if trainer.saved_iteration == trainer.iteration else "; nothing was saved, as --save is not set"
            self._print(trainer, f"stopped after iteration {trainer.iteration}: {trainer.stop_reason}{lost}")

    def _line(self, train_iters: int, columns: float) -> str:
        interval, last = self._interval, self._interval.last
        rate = interval.tokens / max(interval.seconds, 1e-9)
        width, done = len(str(train_iters)), last.iteration / train_iters
        # (place among the important ones, words), in the order of the line
        parts = [
            (0, f"iteration {last.iteration:>{width}}/{train_iters} {done:4.0%}"),
            (1, f"loss {interval.mean('loss'):.4f}"),
            (4, f"grad norm {interval.mean('grad_norm'):.3f}"),
            *_clipped(interval),
            (5, f"lr {last.lr:.2e}"),
            *_loss_scale(interval),
            (6, _duration(interval.seconds / interval.steps)),
            (2, f"{rate:,.0f} tokens/s"),
            (8, f"{_si(rate * self.speed.flops_per_token, 'FLOP/s')} ({self.speed.utilization(rate):.0%} of peak)"),
            *_batch_size(last),
            *_memory(interval),
            *_experts(interval),
            *_further(interval),
            (3, f"ETA {_clock((train_iters - last.iteration) * self._mean_step)}"),
            (12, time.strftime("%Y-%m-%d %H:%M:%S")),
        ]
        return fitting(parts, columns)

    def _width(self) -> float:
        """Columns that a line may take: one less than a terminal has, so that the cursor stays on it."""
        return terminal_columns(self.stream) - 1 if self.live else math.inf

    def _print(self, trainer: Trainer, line: str) -> None:
        logger.info("%s", line)
        if trainer.ctx.is_first_rank and self._shows:
            self.stream.write(f"\r\x1b[2K{line}\n" if self.live else f"{line}\n")
            self.stream.flush()


def describe(trainer: Trainer, stored: int, trained: float = 1.0) -> str:
    """One line on the run: model with ``stored`` parameters, of which a share is ``trained``, layout, batch, data."""
    config, ctx = trainer.config, trainer.ctx
    epoch = sum(trainer.data.epoch_tokens)
    planned = trainer.data.tokens_before(trainer.batches.samples_after(config.training.train_iters))
    layout = f"tp {ctx.tp.size} x " + (f"cp {ctx.cp.size} x " if ctx.cp.size > 1 else "") + f"dp {ctx.dp.size}"
    share = "" if config.model.peft is None else f" ({trained:.2%} trained)"
    if trainer.engine.plan.num_stages > 1:
        layout = f"{trainer.engine.plan.describe()} x {layout}"
    return (
        f"{config.name}: {stored:,} parameters{share} | {layout} on {ctx.device.type} | "
        f"{trainer.batches} x {config.data.seq_length} tokens a step | {trainer.optimizer.implementation} | "
        + (
            f"{epoch:,} training tokens, {planned / epoch:.2f} epochs planned"
            if epoch
            else f"{planned:,} tokens planned"
        )
    )


def fitting(parts: Sequence[tuple[int, str]], columns: float) -> str:
    """The line of ``parts``, (rank in importance, words) each, without the least important ones that do not fit."""
    kept = list(parts)
    while len(kept) > 1 and len(" | ".join(words for _, words in kept)) > columns:
        kept.remove(max(kept, key=lambda part: part[0]))
    line = " | ".join(words for _, words in kept)
    return line if len(line) <= columns else line[: max(int(columns), 0)]


def terminal_columns(stream: TextIO) -> int:
    """The width of the terminal behind ``stream``; COLUMNS, or 80, where it does not say."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _clipped(interval: Interval) -> list[tuple[int, str]]:
    share = interval.mean("clipped") if "clipped" in interval.last.extra else 0.0
    return [(11, f"clipped {share:.0%}")] if share else []


def _loss_scale(interval: Interval) -> list[tuple[int, str]]:
    if "loss_scale" not in interval.last.extra:
        return []
    skipped = round(interval.mean("skipped") * interval.steps)
    return [(7, f"loss scale {interval.last.extra['loss_scale']:g}" + (f", {skipped} skipped" if skipped else ""))]


def _batch_size(last: StepMetrics) -> list[tuple[int, str]]:
    size = last.extra.get("global_batch_size")
    return [] if size is None else [(5, f"batch {size:.0f}")]


def _memory(interval: Interval) -> list[tuple[int, str]]:
    told = interval.last.extra
    if "peak_memory_bytes" not in told:
        return []
    pool = f" of {_si(told['reserved_memory_bytes'], 'B')}" if "reserved_memory_bytes" in told else ""
    faults = f", {told['page_faults']:,.0f} page faults a step" if "page_faults" in told else ""
    return [(9, f"{_si(told['peak_memory_bytes'], 'B')}{pool} memory{faults}")]


def _experts(interval: Interval) -> list[tuple[int, str]]:
    if "expert_max_load" not in interval.last.extra:
        return []
    entropy, load = interval.mean("expert_entropy_bits"), interval.mean("expert_max_load")
    full = ""
    if "expert_overflow" in interval.last.extra:
        full = f", overflow {interval.mean('expert_overflow'):.1%}"
    return [(10, f"experts {entropy:.2f} bits, busiest {load:.1f}x{full}")]


def _further(interval: Interval) -> list[tuple[int, str]]:
    names = [name for name in interval.last.extra if name.startswith("mtp_loss/")]
    return [(10, f"further tokens {', '.join(f'{interval.mean(name):.4f}' for name in names)}")] if names else []


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s a step" if seconds >= 1 else f"{1000 * seconds:.1f} ms a step"


def _bar(share: float) -> str:
    filled = round(_BAR * share)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}]"


def _si(value: float, unit: str) -> str:
    """``2.5e9, 'FLOP/s'`` -> ``2.5 GFLOP/s``."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:.1f} {unit}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
