"""``--eval-test``: the test documents, once the run is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.data.blend import parse_split
from megaforge.data.data_source import SampleView
from megaforge.errors import UserError
from megaforge.training.callbacks import Callback

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class FinalTest(Callback):
    """Measures the model on the first ``--eval-iters`` global batches of the test part after the last save, as
    Megatron-LM does. Where no document falls into that part it says so at the start."""

    def __init__(self) -> None:
        self.samples: SampleView | None = None

    @classmethod
    def of(cls, config: Config) -> FinalTest | None:
        """What the flags ask for."""
        data = config.data
        there = data.mock_data or data.test_data_path or parse_split(data.split)[2]
        return cls() if config.training.eval_test and config.training.eval_iters and there else None

    def on_train_start(self, trainer: Trainer) -> None:
        try:
            self.samples = trainer.data.validation("test")
        except UserError as error:
            print_rank_0(f"--eval-test: no test at the end: {error}")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.complete:
            self.measure(trainer)

    def measure(self, trainer: Trainer) -> None:
        """Now."""
        if self.samples is not None:
            trainer.test(self.samples)
