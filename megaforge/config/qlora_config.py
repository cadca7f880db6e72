"""Flags of ``--peft qlora``: how the matrices that stay as they are are kept in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class QLoraConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of QLoRA."""

    qlora_quant_type: str = flag(
        "nf4",
        "--peft qlora: the 16 levels of a block: quantiles of the normal distribution (nf4, those of bitsandbytes) or "
        "equal steps (int4)",
        choices=("nf4", "int4"),
    )
    qlora_block_size: int = flag(
        64, "--peft qlora: input features that share a scale, a power of two", least=2, most=1 << 16
    )
    qlora_double_quant: bool = flag(True, "--peft qlora: keep the scales in 8 bits, in blocks of 256")

    def validate_qlora(self) -> None:
        """
        Raises:
            UserError: naming the flag, its value and one that works.
        """
        size = self.qlora_block_size
        if size & (size - 1):
            raise UserError(f"--qlora-block-size {size}: use a power of two, as {1 << (size.bit_length() - 1)}")
