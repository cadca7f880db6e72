"""What a run's own evaluations report beside loss, perplexity and accuracy (``--evaluation-metrics``): means over the
labels that count of a number for each token, so that no layout enters.

A package adds some by entry points of the group ``megaforge.evaluation_metrics``, a file by ``--extensions``: what is
registered in :data:`megaforge.registry.EVALUATION_METRICS` makes a :data:`TokenMetric` from the run's configuration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.models.hybrid import ModelOutput
from megaforge.monitor.names import EVALUATION, OWN_METRIC
from megaforge.registry import EVALUATION_METRICS

# Of a micro-batch's output: a number for each token, [s, b], the same on every rank of tp. Where labels do not count it
# has to be finite too.
TokenMetric = Callable[[ModelOutput], Tensor]


def label_probability(config: Config) -> TokenMetric:
    """The probability of each label, of which few bad ones do not make the mean, as they do of the loss."""
    return lambda output: output.log_probs_SB.exp()


def token_metrics(config: Config) -> dict[str, TokenMetric]:
    """Those that the flag asks for, by name.

    Raises:
        UserError: one has the name of a number that every evaluation has.
    """
    names = dict.fromkeys(config.evaluation.evaluation_metrics)
    if taken := names.keys() & {name for name, about in EVALUATION.items() if about.when != OWN_METRIC}:
        raise UserError(f"--evaluation-metrics {min(taken)}: evaluations have a number of this name; register another")
    return {name: EVALUATION_METRICS.get(name)(config) for name in names}


def summed(metric: TokenMetric, output: ModelOutput, name: str) -> Tensor:
    """Over the labels of a micro-batch that count; fp64.

    Raises:
        UserError: it is no number for each token.
    """
    values, mask = metric(output), output.mask_SB
    if values.shape != mask.shape:
        raise UserError(
            f"--evaluation-metrics {name}: it gives {list(values.shape)} numbers; give one for each token, "
            f"{list(mask.shape)}"
        )
    return (values * mask).sum(dtype=torch.float64)
