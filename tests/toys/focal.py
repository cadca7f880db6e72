"""A toy objective: labels that are predicted well count less (Lin et al., arXiv 1708.02002)."""

from __future__ import annotations

from megaforge.data.loader import Batch
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.losses import LossTerm
from megaforge.registry import OBJECTIVES
from megaforge.training.objectives import NextToken


class Focal(NextToken):
    """Cross-entropy times (1 - p)^2."""

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        missing = 1 - output.log_probs_SB.exp()
        return {"loss": LossTerm((missing**2 * output.losses_SB * output.mask_SB).sum(), "labels")}


OBJECTIVES.register("focal", Focal)
