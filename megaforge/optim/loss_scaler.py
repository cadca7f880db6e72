"""Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from typing import Any

from megaforge.config.optimizer_config import OptimizerConfig

GROWTH, BACKOFF = 2.0, 0.5
# What earlier versions wrote for a run that does not scale its loss.
_WITHOUT_SCALING = {"scale": 1.0, "clean_steps": 0, "overflows": 0}
_BORNE = 20  # overflows in a row at a fixed scale, the last of which ends the run
_LARGEST = 2.0**127  # the loss's gradient is fp32


class LossScaler:
    """The factor on the loss that keeps fp16 gradients within range; 1 for good where no scaling is needed, and
    ``--loss-scale`` for good where that is given.

    The rules are those of Megatron-LM's ``DynamicGradScaler``. ``--loss-scale-window`` steps with finite gradients in a
    row double the scale. Overflows are counted from one doubling to the next, however many clean steps lie between
    them: the ``--hysteresis``-th of them, and each further one, halves the scale, down to ``--min-loss-scale``. A step
    whose gradients overflowed is left out.

    Attributes:
        scale: multiply the loss by it, and divide the gradients by it (``clip_gradients`` does).
    """

    def __init__(self, config: OptimizerConfig, *, enabled: bool) -> None:
        self.enabled = enabled
        self._fixed = enabled and config.loss_scale is not None
        self.scale = (config.loss_scale or config.initial_loss_scale) if enabled else 1.0
        self._floor = config.min_loss_scale
        self._window, self._hysteresis = config.loss_scale_window, config.hysteresis
        self._clean_steps = self._overflows = 0

    @property
    def can_fall(self) -> bool:
        """Whether an overflow may be answered by a lower scale, or one that is fixed still be borne."""
        if self._fixed:
            return self._overflows < _BORNE - 1
        return self.enabled and self.scale > self._floor

    def update(self, finite: bool) -> None:
        """Takes in whether this step's gradients were finite.

        ``finite`` must be one answer for the whole world, as that of
        :func:`megaforge.optim.clip.clip_gradients` is: a rank that decided alone would part from the others' weights.
        """
        if not self.enabled:
            return
        if self._fixed:
            self._overflows = 0 if finite else self._overflows + 1
            return
        if finite:
            self._clean_steps += 1
            if self._clean_steps >= self._window:  # beyond it where a run continues with a shorter window
                self._clean_steps = self._overflows = 0
                self.scale = max(self.scale, min(self.scale * GROWTH, _LARGEST))
            return
        self._clean_steps = 0
        self._overflows += 1
        if self._overflows >= self._hysteresis:
            self.scale = max(self.scale * BACKOFF, self._floor)

    def state(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint; empty for a run that does not scale its loss."""
        if not self.enabled:
            return {}
        return {"scale": self.scale, "clean_steps": self._clean_steps, "overflows": self._overflows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state` gave.

        A run that does not scale its loss keeps the factor 1, and one that continues such a run starts at
        ``--initial-loss-scale``: nobody has looked for a scale yet.
        """
        if not self.enabled or not state or state == _WITHOUT_SCALING:
            return
        if self._fixed:
            return
        self.scale = max(float(state["scale"]), self._floor)
        self._clean_steps, self._overflows = int(state["clean_steps"]), int(state["overflows"])
