"""A toy learning-rate schedule, as a user would write one."""

from __future__ import annotations

import math

from megaforge.config.lr_shapes import RateSettings, RateShape
from megaforge.registry import LR_SCHEDULES


def waves(s: RateSettings, step: float) -> float:
    """``--lr``, a tenth up and down."""
    return s.lr * (1 + 0.1 * math.sin(step))


LR_SCHEDULES.register("waves", RateShape(waves, "a tenth up and down around `--lr`", reads=()))
