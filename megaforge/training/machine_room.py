"""How full the run's machines are: their memory, and the disks that the run writes to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megaforge.config.config import Config
from megaforge.device import host_memory_share
from megaforge.monitor.disks import disk_share
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class MachineRoom(Callback):
    """Looks every ``interval`` steps at each rank's machine, and adds the fullest to the step's numbers."""

    place = Place.BEFORE

    def __init__(self, interval: int, written: Iterable[str]) -> None:
        """``written``: files and directories that the run writes; they need not be there yet."""
        self.interval, self.written = interval, [Path(path).absolute() for path in written]

    @classmethod
    def of(cls, config: Config) -> MachineRoom:
        logging, flags = config.logging, config.checkpoint
        named = (flags.save, logging.metrics_file, logging.tensorboard_dir, logging.wandb_save_dir, logging.log_file)
        snapshots = config.resilience.snapshot_dir if config.resilience.snapshot_interval else None
        return cls(config.logging.log_interval, [path for path in (*named, snapshots) if path is not None])

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.iteration % self.interval:
            return
        fullest = torch.tensor([host_memory_share(), disk_share(self.written)], dtype=torch.float64)
        if trainer.ctx.control is not None:
            dist.all_reduce(fullest, op=dist.ReduceOp.MAX, group=trainer.ctx.control)
        memory, disk = fullest.tolist()
        metrics.extra["host_memory_share"] = round(memory, 4)
        if self.written:
            metrics.extra["disk_share"] = round(disk, 4)
