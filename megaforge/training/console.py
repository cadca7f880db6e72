"""What a person sees of a run: one line every ``--log-interval`` iterations, and a live line on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megaforge.models.flops import model_flops_per_token
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import named_specs
from megaforge.training.callbacks import Callback
from megaforge.training.flops import measure_matmul_peak
from megaforge.training.metrics import EvaluationMetrics, StepMetrics
from megaforge.training.state import compute_dtype

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer

_BAR = 24


class ConsoleLog(Callback):
    """Prints on the first rank; all ranks hold one, because they measure the machine's peak together."""

    def __init__(self, interval: int, stream: TextIO | None = None) -> None:
        self.interval = interval
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self._flops_per_token = 0.0
        self._peak = 0.0
        self._seconds = 0.0
        self._tokens = 0
        self._mean_step = 0.0

    def on_train_start(self, trainer: Trainer) -> None:
        dtype = compute_dtype(trainer.config.training)
        self._peak = measure_matmul_peak(trainer.ctx, dtype)
        # A rank may hold only some stages of the model: the whole one is built without memory.
        whole = HybridModel(trainer.config.model, ParallelContext.single("meta"))
        self._flops_per_token = model_flops_per_token(whole, trainer.config.data.seq_length)
        self._print(trainer, describe(trainer, sum(spec.numel for spec, _ in named_specs(whole))))
        peak, each = _si(self._peak, "FLOP/s"), _si(self._flops_per_token, "FLOP")
        self._print(trainer, f"a token costs {each}; matrix products reach {peak} here in {str(dtype)[6:]}")
        if trainer.iteration:
            self._print(trainer, f"continuing after iteration {trainer.iteration}")
        if trainer.finished:
            self._print(trainer, f"nothing left to do: --train-iters {trainer.config.training.train_iters} is reached")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._seconds += metrics.seconds
        self._tokens += metrics.step_tokens
        self._mean_step = metrics.seconds if not self._mean_step else 0.9 * self._mean_step + 0.1 * metrics.seconds
        line = self._line(metrics, trainer.config.training.train_iters)
        if metrics.iteration % self.interval == 0 or trainer.finished:
            self._print(trainer, line)
            self._seconds, self._tokens = 0.0, 0
        elif self.live and trainer.ctx.is_first_rank:
            self.stream.write(f"\r\x1b[2K{_bar(metrics.iteration / trainer.config.training.train_iters)} {line}")
            self.stream.flush()

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        parts = [f"evaluation at iteration {metrics.iteration}: loss {metrics.loss:.4f}"]
        parts.append(f"perplexity {metrics.perplexity:,.2f}")
        if metrics.bits_per_byte is not None:
            parts.append(f"{metrics.bits_per_byte:.4f} bits per byte")
        if metrics.accuracy is not None:
            parts.append(f"accuracy {100 * metrics.accuracy:.1f} %")
        self._print(trainer, " | ".join([*parts, f"{metrics.tokens:,} tokens"]))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self._print(trainer, f"saved {path}")

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.stop_reason is not None:
            self._print(trainer, f"stopped after iteration {trainer.iteration}: {trainer.stop_reason}")

    def _line(self, metrics: StepMetrics, train_iters: int) -> str:
        rate = self._tokens / max(self._seconds, 1e-9)
        speed = rate * self._flops_per_token
        width, done = len(str(train_iters)), metrics.iteration / train_iters
        parts = [
            f"iteration {metrics.iteration:>{width}}/{train_iters} {done:4.0%}",
            f"loss {metrics.loss:.4f}",
            f"grad norm {metrics.grad_norm:.3f}",
            f"lr {metrics.lr:.2e}",
            f"{rate:,.0f} tokens/s",
            f"{_si(speed, 'FLOP/s')} ({speed / self._peak:.0%} of peak)",
            f"ETA {_clock((train_iters - metrics.iteration) * self._mean_step)}",
        ]
        if "loss_scale" in metrics.extra:
            parts.insert(4, f"loss scale {metrics.extra['loss_scale']:g}")
        return " | ".join(parts)

    def _print(self, trainer: Trainer, line: str) -> None:
        if trainer.ctx.is_first_rank:
            self.stream.write(f"\r\x1b[2K{line}\n" if self.live else f"{line}\n")
            self.stream.flush()


def describe(trainer: Trainer, stored: int) -> str:
    """One line on the run: model with ``stored`` parameters, layout, batch, data."""
    config, ctx = trainer.config, trainer.ctx
    epoch = sum(trainer.data.epoch_tokens)
    planned = config.training.train_iters * trainer.global_batch_size * config.data.seq_length
    layout = f"tp {ctx.tp.size} x " + (f"cp {ctx.cp.size} x " if ctx.cp.size > 1 else "") + f"dp {ctx.dp.size}"
    if trainer.pipeline.plan.num_stages > 1:
        layout = f"{trainer.pipeline.plan.describe()} x {layout}"
    return (
        f"{config.name}: {stored:,} parameters | {layout} on {ctx.device.type} | "
        f"{trainer.global_batch_size} x {config.data.seq_length} tokens a step | {trainer.optimizer.implementation} | "
        f"{epoch:,} training tokens, {planned / epoch:.2f} epochs planned"
    )


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
