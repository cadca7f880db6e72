"""``--phase6-output``: what the next phase reads, written at the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaforge.checkpoint.phase_interface import STATE, export_phase6
from megaforge.checkpoint.sources import open_source
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.errors import UserError
from megaforge.parallel.agree import from_first_rank
from megaforge.training.callbacks import Callback, Place
from megaforge.training.compliance_stage import ComplianceStage

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class Phase6Output(Callback):
    """Keeps the last loss and the time of all steps, and writes the folder once the last checkpoint is there. A run
    that was asked to end, or pauses (``--exit-interval``), writes nothing."""

    place = Place.RECORD
    state_name = STATE

    def __init__(self, folder: str, stage: ComplianceStage | None = None) -> None:
        """``stage``: measures the run before."""
        self.folder, self.stage = folder, stage
        self.final_loss: float | None = None
        self.training_time = 0.0

    @classmethod
    def of(cls, config: Config, stage: ComplianceStage | None = None) -> Phase6Output | None:
        """What the flags ask for.

        Raises:
            UserError: at the end of the run its quantization would still be coming in.
        """
        folder, last = config.checkpoint.phase6_output, config.training.train_iters
        if folder is not None and last is not None and (why := config.qat.unfinished(last)):
            raise UserError(
                f"--phase6-output {folder}: after --train-iters {last} quantization is not complete ({why}), and the "
                "next phase reads the last codes; let it end before, or train longer"
            )
        return None if folder is None else cls(folder, stage)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.final_loss = metrics.loss
        self.training_time += metrics.seconds

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        if not trainer.complete or trainer.saved_iteration != trainer.iteration:
            return
        found = None if self.stage is None else self.stage.found
        folder = from_first_rank(trainer.ctx, lambda: export_phase6(open_source(path), self.folder, found))
        print_rank_0(f"--phase6-output: {folder} is written")

    def state(self) -> dict[str, Any]:
        return {"final_loss": self.final_loss, "training_time": self.training_time}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.final_loss, self.training_time = state["final_loss"], state["training_time"]
