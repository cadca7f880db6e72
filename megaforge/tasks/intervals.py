"""How sure a metric of so many examples is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megaforge.tasks.metrics import Sums, TextMetric

_NORMAL = 1.959963984540054  # of a two-sided interval of 95 %
_DRAWS, _SEED = 1000, 1234


def interval(metric: TextMetric, sums: Sequence[Sums]) -> tuple[float, float]:
    """The bounds of a 95 % confidence interval of ``metric`` from each example's sums.

    Of a share of examples that are right it is Wilson's (1927), which has a width at 0 and at 1 too; else that of 1,000
    redrawn sets of examples (Efron's percentile bootstrap, 1979), always the same draws.
    """
    values = np.array(sums, np.float64)
    if len(values) and values.shape[1] == 1 and np.isin(values, (0.0, 1.0)).all():
        return wilson(float(values.sum()), len(values))
    draws = np.random.default_rng(_SEED).multinomial(len(values), np.full(len(values), 1 / len(values)), size=_DRAWS)
    found = np.array([metric.value(totals.tolist(), len(values)) for totals in draws @ values])
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def wilson(right: float, examples: int) -> tuple[float, float]:
    """Wilson's interval of a share: ``right`` of so many."""
    share, square = right / examples, _NORMAL**2
    middle = (share + square / (2 * examples)) / (1 + square / examples)
    half = math.sqrt(share * (1 - share) / examples + square / (4 * examples**2)) * _NORMAL / (1 + square / examples)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding
