"""Shapes of the learning rate: pure functions of the step, by the names that ``--lr-decay-style`` takes. No torch.

A file of one's own adds one::

    import math

    from megaforge.config.lr_shapes import RateShape
    from megaforge.registry import LR_SCHEDULES


    def waves(s, step):
        return s.lr * (1 + 0.1 * math.sin(step / 100))


    LR_SCHEDULES.register("waves", RateShape(waves, "a tenth up and down around --lr", reads=()))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from megaforge.config.length_config import LengthConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.errors import UserError


@dataclass(frozen=True)
class RateSettings:
    """What a shape may read: the flags of these names with their defaults filled in.

    Lengths are counted as the run counts them, in iterations or in samples (``unit``); they need not be whole.
    """

    lr: float
    lr_warmup_iters: float
    min_lr: float
    lr_decay_iters: float
    lr_wsd_decay_iters: float
    lr_wsd_decay_style: str = "minus_sqrt"
    lr_restart_iters: float = 0.0
    lr_restart_mult: float = 1.0
    lr_warmup_init: float = 0.0
    unit: str = "iterations"

    @classmethod
    def of(cls, config: OptimizerConfig, train_iters: int) -> RateSettings:
        """Those of a run of ``train_iters`` iterations."""
        decay = config.lr_decay_iters or train_iters
        return cls(
            lr=config.lr,
            lr_warmup_iters=decay * config.lr_warmup_fraction if config.lr_warmup_fraction else config.lr_warmup_iters,
            min_lr=config.min_lr,
            lr_decay_iters=decay,
            lr_wsd_decay_iters=config.lr_wsd_decay_iters or max(1, decay // 10),
            lr_wsd_decay_style=config.lr_wsd_decay_style,
            lr_restart_iters=config.lr_restart_iters or decay,
            lr_restart_mult=config.lr_restart_mult,
            lr_warmup_init=config.lr_warmup_init,
        )

    @classmethod
    def in_samples(cls, config: OptimizerConfig, length: LengthConfig) -> RateSettings | None:
        """Those of a run whose schedule is given in samples throughout, as Megatron-LM counts it then; otherwise None:
        a length in iterations or epochs lets all of it be counted in iterations."""
        end = length.lr_decay_samples or length.train_samples
        others = (
            *(length.lr_warmup_epochs, length.lr_decay_epochs, length.lr_wsd_decay_epochs, length.lr_restart_epochs),
            config.lr_restart_iters,
            # What is given in samples stands here too, once it is counted.
            None if length.lr_warmup_samples else config.lr_warmup_iters or None,
            None if length.lr_decay_samples else config.lr_decay_iters,
            None if length.lr_wsd_decay_samples else config.lr_wsd_decay_iters,
        )
        if end is None or any(other is not None for other in others):
            return None
        share = config.lr_warmup_fraction
        return dataclasses.replace(
            cls.of(config, end),
            lr_warmup_iters=end * share if share else length.lr_warmup_samples or 0,
            lr_decay_iters=end,
            lr_wsd_decay_iters=length.lr_wsd_decay_samples or max(1, end // 10),
            lr_restart_iters=end,
            unit="samples",
        )


@dataclass(frozen=True)
class RateShape:
    """A shape of the learning rate.

    Attributes:
        rate: ``rate(settings, step)``, the learning rate of a step behind the warm-up. Steps count from 1.
        summary: one line for the documents.
        reads: the flags that the shape depends on besides ``lr`` and the warm-up's, by their names with underscores:
            a run that goes on with others has another schedule. A flag that is not among them is idle.
        callbacks: names of callbacks that belong to it.

    Raises:
        UserError: there is no setting of a name in ``reads``.
    """

    rate: Callable[[RateSettings, float], float]
    summary: str
    reads: tuple[str, ...] = ("min_lr", "lr_decay_iters")
    callbacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = [field.name for field in dataclasses.fields(OptimizerConfig)]
        for name in self.reads:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                raise UserError(
                    f"a learning-rate shape reads {name!r}, which is not a setting of the optimizer section"
                    + (f"; did you mean {close[0]}?" if close else "; leave it out of reads")
                )


def constant(s: RateSettings, step: float) -> float:
    """``--lr`` for ever."""
    return s.lr


def cosine(s: RateSettings, step: float) -> float:
    """Half a cosine (Loshchilov & Hutter, arXiv 1608.03983): ``--min-lr`` from ``--lr-decay-iters`` on."""
    return _between(s, _cosine(_progress(s, step)))


def linear(s: RateSettings, step: float) -> float:
    """A straight line: ``--min-lr`` from ``--lr-decay-iters`` on."""
    return _between(s, 1 - _progress(s, step))


def warmup_stable_decay(s: RateSettings, step: float) -> float:
    """``--lr`` until a final decay of ``--lr-wsd-decay-iters`` (warm-up, stable, decay: arXiv 2404.06395)."""
    start = max(s.lr_warmup_iters, s.lr_decay_iters - s.lr_wsd_decay_iters)
    if step <= start:
        return s.lr
    if step >= s.lr_decay_iters:
        return s.min_lr
    return _between(s, WSD_DECAYS[s.lr_wsd_decay_style]((step - start) / (s.lr_decay_iters - start)))


def cosine_restarts(s: RateSettings, step: float) -> float:
    """Cosines one behind the other (warm restarts, arXiv 1608.03983): the first of ``--lr-restart-iters`` behind the
    warm-up, each next ``--lr-restart-mult`` times as long. A cycle's last step is at ``--min-lr``, and so is what lies
    beyond ``--lr-decay-iters``."""
    if step >= s.lr_decay_iters:
        return s.min_lr
    done, length, mult = step - s.lr_warmup_iters, s.lr_restart_iters, s.lr_restart_mult
    while done > length:
        done, length = done - length, length * mult
    return _between(s, _cosine(done / length))


def inverse_square_root(s: RateSettings, step: float) -> float:
    """``--lr`` times the root of warm-up over step (Vaswani et al., arXiv 1706.03762; as Megatron-LM's: at least
    ``--min-lr``, which is all that is left behind ``--lr-decay-iters``)."""
    if step > s.lr_decay_iters:
        return s.min_lr
    return max(s.min_lr, s.lr * math.sqrt(max(s.lr_warmup_iters, 1)) / math.sqrt(step))


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# What is left of (--lr - --min-lr) at a share of WSD's decay, as Megatron-LM names them; Hägele et al. (arXiv
# 2405.18392) found minus_sqrt best.
WSD_DECAYS: dict[str, Callable[[float], float]] = {
    "exponential": lambda progress: 2 * 0.5**progress - 1,
    "linear": lambda progress: 1 - progress,
    "cosine": _cosine,
    "minus_sqrt": lambda progress: 1 - math.sqrt(progress),
}


def _progress(s: RateSettings, step: float) -> float:
    """The share (0 to 1) of the way from the warm-up's end to ``--lr-decay-iters``."""
    if step >= s.lr_decay_iters:
        return 1.0
    return (step - s.lr_warmup_iters) / (s.lr_decay_iters - s.lr_warmup_iters)


def _between(s: RateSettings, share: float) -> float:
    return s.min_lr + (s.lr - s.min_lr) * share


CONSTANT = RateShape(constant, "`--lr`", reads=())
COSINE = RateShape(cosine, "half a cosine to `--min-lr`")
LINEAR = RateShape(linear, "a straight line to `--min-lr`")
WSD = RateShape(
    warmup_stable_decay,
    "`--lr`, then a final decay of `--lr-wsd-decay-iters` as `--lr-wsd-decay-style` says",
    reads=("min_lr", "lr_decay_iters", "lr_wsd_decay_iters", "lr_wsd_decay_style"),
)
COSINE_RESTARTS = RateShape(
    cosine_restarts,
    "half cosines one behind the other, the first of `--lr-restart-iters`, each next `--lr-restart-mult` times as long",
    reads=("min_lr", "lr_decay_iters", "lr_restart_iters", "lr_restart_mult"),
)
PLATEAU = RateShape(
    constant,
    "`--lr`, times `--lr-plateau-factor` each time evaluations improve no longer, at least `--min-lr`",
    reads=("min_lr", "lr_plateau_factor", "lr_plateau_patience", "lr_plateau_threshold"),
    callbacks=("reduce_on_plateau",),
)
INVERSE_SQUARE_ROOT = RateShape(
    inverse_square_root, "`--lr` x sqrt(warm-up / step), at least `--min-lr`, up to `--lr-decay-iters`"
)
