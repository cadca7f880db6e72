"""The numbers a step and an evaluation report; all are global, the same on every rank and at every layout.

:mod:`megaforge.monitor.names` lists their names.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        iteration: number of the step, from 1.
        loss: cross-entropy in nats, mean over the global batch's tokens.
        grad_norm: global L2 norm of the gradient before clipping.
        lr: learning rate of this step.
        tokens: tokens consumed so far in the run.
        consumed_samples: samples consumed so far in the run.
        step_tokens: tokens of this step.
        seconds: wall time of the step; 0 before it was taken.
        extra: auxiliary losses, expert balance, loss scale, what the machine did; by name. Callbacks add to it before
            the record is written.
    """

    iteration: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    consumed_samples: int
    step_tokens: int
    seconds: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.step_tokens / max(self.seconds, 1e-9)

    def after(self, seconds: float) -> StepMetrics:
        """The same step, which took ``seconds``."""
        return dataclasses.replace(self, seconds=seconds)

    def values(self) -> dict[str, float | int]:
        """The record without its iteration, as sinks write it."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "tokens": self.tokens,
            "consumed_samples": self.consumed_samples,
            "step_seconds": round(self.seconds, 6),
            "tokens_per_second": round(self.tokens_per_second, 1),
            **self.extra,
        }


@dataclass(frozen=True)
class EvaluationMetrics:
    """One evaluation: sums over its tokens, and the usual numbers made of them.

    Attributes:
        iteration: the step after which it was made.
        nats: summed cross-entropy.
        tokens: predicted tokens.
        correct: tokens whose most likely prediction was right; None if not counted.
        text_bytes: UTF-8 bytes of the text those tokens stand for; None if unknown.
        due: whether it is one of ``--eval-interval``; others, where a run ends for now, must not change what a run
            that goes on does.
        extra: metrics of ``--evaluation-metrics``, by name.
    """

    iteration: int
    nats: float
    tokens: int
    correct: int | None = None
    text_bytes: float | None = None
    due: bool = True
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else self.correct / self.tokens

    def values(self) -> dict[str, float | int]:
        """The record without its iteration, as sinks write it; unknown numbers are left out."""
        named = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
        }
        return {name: value for name, value in named.items() if value is not None} | self.extra
