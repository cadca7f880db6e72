"""What a run's model makes for itself before a step learns from it: the part of a plan that goes with an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from megaforge.config.config import Config
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.registry import PLANNED_ROUNDS

if TYPE_CHECKING:
    from megaforge.planning.layout import PlannedLayout
    from megaforge.planning.stages import ModelParts, StagePart


class Rounds(ABC):
    """Rounds of a run; one is made before every ``epochs`` steps, while there are no activations. Hashable.

    Attributes:
        doing: in a word.
        epochs: steps that learn from a round.
        has_reference: whether the reference takes a pass of its own.
        keeps_weights: whether that is of a copy of all weights, which the run keeps as it does masters.
        without: what is said of it where it does not.
    """

    doing: ClassVar[str]
    without: ClassVar[str]
    epochs: int
    has_reference: bool
    keeps_weights: bool = False

    @abstractmethod
    def rows(self, samples: int, length: int) -> int:
        """Of ``length`` tokens, that a micro-batch of so many samples has at most."""

    def step_bytes(self, parts: ModelParts, layout: PlannedLayout) -> float:
        """What its losses need of a micro-batch besides, where the last stage is."""
        return 0.0

    @abstractmethod
    def device_bytes(self, parts: ModelParts, layout: PlannedLayout, own: Sequence[StagePart]) -> float:
        """What making a round needs at most on a rank with the stages ``own``."""

    @abstractmethod
    def host_bytes(self, parts: ModelParts, layout: PlannedLayout) -> dict[str, float]:
        """What is kept of it in host memory at most, by what it is."""

    @abstractmethod
    def seconds(
        self, parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], gpu: Gpu, efficiency: Efficiency
    ) -> tuple[float, float]:
        """That making a round takes, at least and at most."""

    @abstractmethod
    def described(self, layout: PlannedLayout) -> str:
        """What is made, and how large it is at most."""

    @abstractmethod
    def between(self) -> str:
        """What the least and the most time differ by."""


def rounds_of(config: Config) -> Rounds | None:
    """Those of a run; None: its objective makes nothing.

    Raises:
        UserError: they cannot be as they are asked for.
    """
    objective = config.training.objective
    if objective not in PLANNED_ROUNDS:
        return None
    made: Rounds | None = PLANNED_ROUNDS.get(objective)(config)
    return made
