"""Update rules, learning-rate schedules, loss scaling and clipping."""

from torch import nn

from megaforge.config.run_config import OptimizerConfig
from megaforge.optim.adamw import AdamW
from megaforge.optim.clip import clip_gradients, global_grad_norm
from megaforge.optim.loss_scaler import LossScaler
from megaforge.optim.schedule import LearningRateSchedule
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.zero import ShardedParameters

__all__ = ["AdamW", "LearningRateSchedule", "LossScaler", "build_optimizer", "clip_gradients", "global_grad_norm"]


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, ctx: ParallelContext, shards: ShardedParameters | None = None
) -> AdamW:
    """The optimizer of ``model``, whose weights must be initialised: masters start as copies of them.

    With ``shards`` (ZeRO) each rank updates its own share, and keeps masters and moments of it alone.
    """
    return AdamW(config, model, ctx, shards)
