"""Update rules and the masters they update, learning-rate schedules, loss scaling and clipping."""

from megaforge.optim.clip import GradientLimits, clip_gradients, global_grad_norm
from megaforge.optim.loss_scaler import LossScaler
from megaforge.optim.main_parameters import MainParameter, MainParameters
from megaforge.optim.optimizer import Optimizer, bucket_policy
from megaforge.optim.schedule import LearningRateSchedule
from megaforge.optim.update_rule import UpdateRule

__all__ = [
    "GradientLimits",
    "LearningRateSchedule",
    "LossScaler",
    "MainParameter",
    "MainParameters",
    "Optimizer",
    "UpdateRule",
    "bucket_policy",
    "clip_gradients",
    "global_grad_norm",
]
