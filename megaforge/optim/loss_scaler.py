"""Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from megaforge.config.run_config import OptimizerConfig

GROWTH, BACKOFF = 2.0, 0.5


class LossScaler:
    """The factor on the loss that keeps fp16 gradients within range; 1 for good where no scaling is needed.

    ``--loss-scale-window`` steps with finite gradients in a row double it; ``--hysteresis`` overflows in a row, and
    each further one, halve it, down to ``--min-loss-scale``. A step whose gradients overflowed is left out.

    Attributes:
        scale: multiply the loss by it, and divide the gradients by it (``clip_gradients`` does).
    """

    def __init__(self, config: OptimizerConfig, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = config.initial_loss_scale if enabled else 1.0
        self._floor = config.min_loss_scale
        self._window, self._hysteresis = config.loss_scale_window, config.hysteresis
        self._clean_steps = self._overflows = 0

    def update(self, finite: bool) -> None:
        """Takes in whether this step's gradients were finite.

        ``finite`` must be one answer for the whole world, as that of
        :func:`megaforge.optim.clip.clip_gradients` is: a rank that decided alone would part from the others' weights.
        """
        if not self.enabled:
            return
        if finite:
            self._overflows = 0
            self._clean_steps += 1
            if self._clean_steps == self._window:
                self._clean_steps = 0
                self.scale *= GROWTH
            return
        self._clean_steps = 0
        self._overflows += 1
        if self._overflows >= self._hysteresis:
            self.scale = max(self.scale * BACKOFF, self._floor)

    def state(self) -> dict[str, float]:
        """JSON-able state for a checkpoint."""
        return {"scale": self.scale, "clean_steps": self._clean_steps, "overflows": self._overflows}

    def load_state(self, state: dict[str, float]) -> None:
        """Takes back what :meth:`state` gave; a run that does not scale its loss keeps the factor 1."""
        if self.enabled:
            self.scale = float(state["scale"])
            self._clean_steps, self._overflows = int(state["clean_steps"]), int(state["overflows"])
