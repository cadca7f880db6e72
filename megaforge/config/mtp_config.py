"""Flags of multi-token prediction, with Megatron-LM's names where it has them. They say what is trained, so they are a
part of the model's own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.registry import MULTI_TOKEN


@dataclass(frozen=True)
class MultiTokenConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of multi-token prediction."""

    mtp_num_layers: int | None = flag(
        None,
        "tokens predicted at each place beyond the next one, each by a module of its own (default: one for each / of "
        "--hybrid-layer-pattern)",
        least=0,
        most=64,
    )
    mtp_mode: str = flag(
        "sequential",
        "what predicts them: modules one behind the other, each given one token more (DeepSeek-V3), or heads side by "
        "side on what the last block is given (Gloeckle et al.)",
        choices=MULTI_TOKEN,
    )
    mtp_loss_scaling_factor: float | None = flag(
        None,
        "weight of the mean of their losses beside that of the next token (default: sequential 0.1; parallel their "
        "number, which is a weight of 1 for each)",
        least=0,
    )

    def mtp_weight(self, predictions: int) -> float:
        """Weight of the loss of each of so many predictions."""
        if self.mtp_loss_scaling_factor is not None:
            return self.mtp_loss_scaling_factor / predictions
        return 1.0 if self.mtp_mode == "parallel" else 0.1 / predictions
