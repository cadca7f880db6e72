"""Flags of how quantization comes in while a model trains, and what a run tells of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from megaforge.config.fields import flag
from megaforge.errors import UserError

WEIGHTS = ("none", "binary", "ternary", "int4", "int8")
ACTIVATIONS = ("none", "int8", "int4")


class QuantStage(NamedTuple):
    """One of ``--quant-stages``.

    Attributes:
        start: iterations before it.
        weights, activations: kinds, or ``none``.
        share: of the way to the quantized product.
        lr, wd: factors on learning rate and weight decay.
    """

    start: int
    weights: str
    activations: str = "int8"
    share: float = 1.0
    lr: float = 1.0
    wd: float = 1.0


@dataclass(frozen=True)
class QATConfig:
    """Quantization-aware training: from full precision to codes by and by, in stages; statistics."""

    quant_lambda: str | None = flag(
        None,
        "let quantization come in by and by: products see x + lambda * (q(x) - x) with lambda from 0 to 1",
        choices=("linear", "step", "exponential", "sigmoid"),
    )
    quant_lambda_start_iters: int = flag(0, "with --quant-lambda: iterations before lambda begins to grow", least=0)
    quant_lambda_end_iters: int | None = flag(None, "with --quant-lambda: from this iteration on it is 1", least=1)
    quant_lambda_steps: int = flag(4, "with --quant-lambda step: equal steps in which it grows", least=1, most=1000)
    quant_lambda_sharpness: float = flag(
        10.0, "with --quant-lambda exponential or sigmoid: the larger, the more suddenly", above=0, most=500
    )
    quant_stages: tuple[str, ...] = flag(
        (),
        "train in stages, each from an iteration on: 0:none 500:int8/int8 1000:ternary/int8,lambda=1,lr=0.7,wd=0 "
        "(weights/activations, factors on learning rate and weight decay); the last one is the model's own",
        metavar="STAGE",
    )
    calibration_interval: int = flag(1000, "with --online-calibration: iterations from one to the next", least=1)
    calibration_samples: int = flag(512, "with --online-calibration: samples that each one looks at", least=1)
    calibration_ema: float = flag(
        0.9, "with --online-calibration: what a step leaves of the average of earlier ones", least=0, below=1
    )
    quant_clip_interval: int = flag(1000, "with --quant-clip: iterations from one choice to the next", least=1)
    quant_clip_grid: tuple[float, ...] = flag(
        (0.6, 0.8, 1.0, 1.25, 1.5), "with --quant-clip: the shares to choose from", above=0, most=4, metavar="SHARE"
    )
    log_quantization: bool = flag(
        False, "at each --log-interval: error of quantization, flipped and saturated codes, steps"
    )

    @property
    def stages(self) -> tuple[QuantStage, ...]:
        """``--quant-stages``, read.

        Raises:
            UserError: one is not of the form.
        """
        return tuple(_stage(text) for text in self.quant_stages)

    def stage_at(self, step: int) -> QuantStage:
        """The stage that step ``step`` (from 1) is in; there are some."""
        return [one for one in self.stages if one.start < step][-1]

    def share_at(self, step: int) -> float:
        """Lambda in step ``step`` (from 1), in [0, 1], after the schedules of huggingface/blog,
        1_58_llm_extreme_quantization.md: with p the progress from start to end, ``linear`` p; ``step`` p rounded down
        to equal steps; ``exponential`` (e^(kp) - 1) / (e^k - 1); ``sigmoid`` the logistic function of k (p - 1/2),
        stretched to reach 0 and 1. Without a schedule 1."""
        start, end = self.quant_lambda_start_iters, self.quant_lambda_end_iters
        if self.quant_lambda is None or end is None or step >= end:
            return 1.0
        progress = max(0.0, (step - start) / (end - start))
        k = self.quant_lambda_sharpness
        if self.quant_lambda == "step":
            return math.floor(progress * self.quant_lambda_steps) / self.quant_lambda_steps
        if self.quant_lambda == "exponential":
            return (math.exp(k * progress - k) - math.exp(-k)) / (1 - math.exp(-k))
        if self.quant_lambda == "sigmoid":
            edge = math.tanh(k / 4)
            return 0.5 + 0.5 * math.tanh(k * (progress - 0.5) / 2) / edge
        return progress

    def unfinished(self, iteration: int) -> str | None:
        """Why a model after so many iterations is not yet the one that its last codes are of; None where it is."""
        if self.stages and self.stage_at(max(iteration, 1)) != self.stages[-1]:
            return f"the last of --quant-stages begins after iteration {self.stages[-1].start}"
        if (share := self.share_at(iteration)) < 1:
            end = self.quant_lambda_end_iters
            return f"lambda of --quant-lambda {self.quant_lambda} is {share:.3g}, and 1 from iteration {end} on"
        return None

    def validate(self) -> None:
        if not self.quant_clip_grid:
            raise UserError("--quant-clip-grid: give at least one share, such as 0.8 0.9 1")
        end = self.quant_lambda_end_iters
        if end is not None and end <= self.quant_lambda_start_iters:
            raise UserError(
                f"--quant-lambda-end-iters {end}: must be beyond --quant-lambda-start-iters "
                f"{self.quant_lambda_start_iters}"
            )
        starts = [stage.start for stage in self.stages]
        if starts and (starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False))):
            raise UserError(
                f"--quant-stages {' '.join(self.quant_stages)}: the first begins at 0, and each later than the last"
            )


def _stage(text: str) -> QuantStage:
    wrong = UserError(
        f"--quant-stages {text}: write ITERATIONS:WEIGHTS/ACTIVATIONS and lambda=, lr= or wd= behind commas, such as "
        f"500:ternary/int8,lr=0.5; weights are {', '.join(WEIGHTS)}, activations {', '.join(ACTIVATIONS)}"
    )
    start, colon, rest = text.partition(":")
    kinds, *settings = rest.split(",")
    weights, _, activations = kinds.partition("/")
    activations = activations or ("none" if weights == "none" else "int8")
    try:
        values = {name: float(value) for name, value in (one.split("=") for one in settings)}
        share, lr, wd = values.pop("lambda", 1.0), values.pop("lr", 1.0), values.pop("wd", 1.0)
        stage = QuantStage(int(start), weights, activations, share, lr, wd)
    except ValueError as error:
        raise wrong from error
    fits = stage.start >= 0 and 0 <= share <= 1 and 0 <= lr < 1e6 and 0 <= wd < 1e6
    if not colon or values or weights not in WEIGHTS or activations not in ACTIVATIONS or not fits:
        raise wrong
    return stage
