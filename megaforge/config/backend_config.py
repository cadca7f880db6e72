"""Which implementation of an operation layers call, where there are several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.config.micro_batch_config import MicroBatchConfig
from megaforge.errors import UserError


@dataclass(frozen=True)
class BackendConfig(MicroBatchConfig):
    """What :class:`megaforge.config.run_config.TrainingConfig` has of implementations."""

    wkv_backend: str = flag(
        "auto",
        "RWKV-7's recurrence: native is compiled code, torch plain torch, fla the Triton kernels of fla-core (GPUs; "
        "extra 'gpu'); auto is native where there is some for the device, else torch; native16, on GPUs, keeps a state "
        "of every 16 tokens, not of 64, and computes none again",
        choices=("auto", "native", "native16", "fla", "torch"),
    )
    mamba_backend: str = flag(
        "auto",
        "Mamba-2's recurrence: torch is plain torch, mamba-ssm the Triton kernels of that package (GPUs; extra "
        "'mamba'); auto is mamba-ssm where it is installed, on GPUs with --bf16 or --fp16, else torch",
        choices=("auto", "mamba-ssm", "torch"),
    )

    @property
    def backends(self) -> Mapping[str, str]:
        """What was asked for, by the name of the operation in :mod:`megaforge.kernels`."""
        return {"wkv": self.wkv_backend, "ssd": self.mamba_backend}

    def check_backends(self, device: str, fp64: bool) -> None:
        """
        Raises:
            UserError: one that computes on GPUs alone is named for another device, or for fp64.
        """
        for flag_name, value, only in (
            ("--wkv-backend", self.wkv_backend, ("fla", "native16")),
            ("--mamba-backend", self.mamba_backend, ("mamba-ssm",)),
        ):
            if value in only and (device == "cpu" or fp64):
                given = f"{flag_name} {value} with {'--device cpu' if device == 'cpu' else '--fp64'}"
                raise UserError(f"{given}: it computes on GPUs, not in fp64; use {flag_name} auto")
