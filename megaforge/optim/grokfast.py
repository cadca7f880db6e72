"""Grokfast (Lee et al., arXiv 2405.20233): a gradient's slow part is added to it, several times over.

Both filters are those of github.com/ironjr/grokfast, and give its bits: each product and each sum is rounded by itself,
in the same order.
"""

from __future__ import annotations

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim.gradient_filter import GradientFilter


class ExponentialMean(GradientFilter):
    """``h = alpha h + (1 - alpha) g``, then ``g += lambda h``; h begins as the first gradient (``--grokfast ema``)."""

    @classmethod
    def rows(cls, config: OptimizerConfig) -> int:
        return 1

    @classmethod
    def gain(cls, config: OptimizerConfig) -> float:
        return 1 + _factor(config, 2.0)

    def filter(self) -> None:
        alpha, factor = self.config.grokfast_alpha, _factor(self.config, 2.0)
        for columns, held in self.stretches():
            for place, gradient in held:
                slow = self.kept[0, columns][place]
                if not self.updates:
                    slow.copy_(gradient)
                slow.mul_(alpha).add_(gradient * (1 - alpha))
                gradient.add_(slow * factor)


class WindowMean(GradientFilter):
    """``g += lambda mean(window)``, over the newest gradients with this one, from when there are as many as the window
    holds (``--grokfast ma``). They are summed anew in each update, oldest first: a running sum would drift."""

    @classmethod
    def rows(cls, config: OptimizerConfig) -> int:
        return config.grokfast_window

    @classmethod
    def gain(cls, config: OptimizerConfig) -> float:
        return max(1 + _factor(config, 5.0), config.grokfast_window)  # the window is summed before it is divided

    def filter(self) -> None:
        window, factor = self.config.grokfast_window, _factor(self.config, 5.0)
        newest = self.updates % window
        order = [(newest + 1 + age) % window for age in range(window)]
        for columns, held in self.stretches():
            rows = self.kept[:, columns]
            for place, gradient in held:
                rows[newest, place].copy_(gradient)
            if self.updates + 1 < window:
                continue
            mean = rows[order[0]].clone()
            for row in order[1:]:
                mean.add_(rows[row])
            mean.div_(window).mul_(factor)
            for place, gradient in held:
                gradient.add_(mean[place])


def _factor(config: OptimizerConfig, usual: float) -> float:
    return usual if config.grokfast_lambda is None else config.grokfast_lambda
