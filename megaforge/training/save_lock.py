"""A run that saves keeps other runs out of its ``--save``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megaforge.checkpoint.lock import SaveLock, take_lock
from megaforge.config.checkpoint_config import CheckpointConfig
from megaforge.parallel.agree import together
from megaforge.parallel.context import ParallelContext
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class HeldLock(Callback):
    """Holds the lock of ``--save`` until the last checkpoint is written; rank 0's does."""

    place = Place.AFTER

    def __init__(self, lock: SaveLock | None) -> None:
        self.lock = lock

    @classmethod
    def take(cls, config: CheckpointConfig, ctx: ParallelContext) -> HeldLock:
        """Takes it. Collective.

        Raises:
            UserError: on every rank: another run saves there.
        """
        wanted = config.save is not None and ctx.is_first_rank
        return cls(together(ctx, lambda: take_lock(Path(str(config.save))) if wanted else None))

    def on_train_end(self, trainer: Trainer) -> None:
        if self.lock is not None:
            self.lock.release()
