"""Flags of ``--peft adalora``: how the ranks of adapters shrink while they are trained."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class AdaLoraConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of it."""

    adalora_target_rank: int = flag(
        8, "--peft adalora: mean rank of the adapters at the end, of --lora-rank at the beginning", least=1
    )
    adalora_warmup_fraction: float = flag(
        0.1, "--peft adalora: share of the run's steps before ranks begin to shrink", least=0, below=1
    )
    adalora_final_fraction: float = flag(
        0.3, "--peft adalora: share of the run's steps, the last ones, with the final ranks", least=0, below=1
    )
    adalora_interval: int = flag(1, "--peft adalora: steps from one choice of ranks to the next", least=1)
    adalora_beta1: float = flag(0.85, "--peft adalora: decay of the mean of sensitivities", above=0, below=1)
    adalora_beta2: float = flag(0.85, "--peft adalora: decay of the mean of their deviations", above=0, below=1)
    adalora_orthogonality: float = flag(
        0.5, "--peft adalora: weight of the mean of ||A A^T - I|| and ||B^T B - I|| in the loss", least=0
    )

    def validate_adalora(self) -> None:
        """
        Raises:
            UserError: naming the flag, its value and one that works.
        """
        if self.adalora_warmup_fraction + self.adalora_final_fraction >= 1:
            raise UserError(
                f"--adalora-warmup-fraction {self.adalora_warmup_fraction:g} and --adalora-final-fraction "
                f"{self.adalora_final_fraction:g} leave no step between them; use a sum below 1"
            )
