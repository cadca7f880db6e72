"""What fine-tuning does where nothing is said: defaults of ``finetune_cdrmix.py`` and of the builder."""

from __future__ import annotations

from collections.abc import Mapping

DEFAULTS: Mapping[str, object] = {
    "checkpoint.use_checkpoint_args": True,
    "optimizer.optimizer": "adam",
    "optimizer.lr": 2e-4,
    "training.early_stopping_patience": 5,
}
