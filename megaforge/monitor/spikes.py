"""What is a spike of the loss or of the gradient's norm, beside the steps before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

SIGMAS = 6.0  # beyond the median, in standard deviations as the median absolute deviation tells them
LEAST = {"loss": 0.1, "grad_norm": 1.0}  # and by at least this share of the median
DEVIATION = 1.4826  # of a normal distribution, in units of its median absolute deviation


def is_spike(value: float, window: Sequence[float], least: float) -> bool:
    """Whether ``value`` lies beyond what ``window`` leads to expect: above its median by more than :data:`SIGMAS`
    standard deviations and by more than ``least`` of the median's magnitude."""
    middle = median(window)
    deviation = DEVIATION * median(abs(one - middle) for one in window)
    return value - middle > max(SIGMAS * deviation, least * abs(middle))


class RecentSteps:
    """Losses and gradient norms of the last ``window`` steps, and what spikes beside them (:func:`is_spike`); nothing
    does until a quarter of the window is filled."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen: dict[str, list[float]] = {name: [] for name in LEAST}

    def spikes(self, values: Mapping[str, float]) -> list[str]:
        """Which of ``values`` do."""
        filled = max(2, self.window // 4)
        return [
            name
            for name, value in values.items()
            if len(self.seen[name]) >= filled and is_spike(value, self.seen[name], LEAST[name])
        ]

    def enter(self, values: Mapping[str, float]) -> None:
        """They tell what is usual from now on."""
        for name, value in values.items():
            self.seen[name] = [*self.seen[name], value][-self.window :]

    def suspicion(self, values: Mapping[str, float]) -> str | None:
        """The first that spikes, in words; where none does, ``values`` enter."""
        for name in self.spikes(values):
            return f"{name} spikes to {values[name]:.4g}"
        self.enter(values)
        return None

    def load(self, seen: Mapping[str, Sequence[float]]) -> None:
        """Takes over :attr:`seen` of an earlier one, whose window may have been longer."""
        self.seen = {name: list(values)[-self.window :] for name, values in seen.items()}
