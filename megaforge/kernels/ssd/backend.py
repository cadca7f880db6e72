"""Which implementation of Mamba-2's recurrence a layer calls."""

from __future__ import annotations

import torch

from megaforge.errors import UserError
from megaforge.kernels.native import say_fallback
from megaforge.kernels.ssd import SSD, ssd_chunked
from megaforge.kernels.ssd.mamba_ssm import scan, ssd_mamba_ssm

_HALF = (torch.bfloat16, torch.float16)


def ssd_backend(name: str, device: torch.device, dtype: torch.dtype) -> SSD:
    """The implementation that ``--mamba-backend`` names.

    Args:
        name: auto, mamba-ssm or torch.
        device: where the tensors will be.
        dtype: what the model computes in. The kernels' products of fp32 are in TF32, so that auto leaves fp32 to torch.

    Raises:
        UserError: it cannot run here.
    """
    if name == "auto" and device.type == "cuda" and dtype in _HALF:
        try:
            _ = scan("its fast form")
        except UserError as error:
            say_fallback("Mamba-2's recurrence", str(error), "plain torch")
            return ssd_chunked
        return ssd_mamba_ssm(dtype)
    if name != "mamba-ssm":
        return ssd_chunked
    if device.type == "meta":  # a plan: the kernels compute where they are, on GPUs
        say_fallback("Mamba-2's recurrence", "mamba-ssm computes nothing in plans and dry runs", "the memory of torch")
        return ssd_chunked
    if device.type != "cuda":
        raise UserError(
            f"--mamba-backend mamba-ssm: its kernels run on GPUs, not on {device.type}; use --mamba-backend auto"
        )
    if dtype == torch.float64:
        raise UserError("--mamba-backend mamba-ssm: its kernels compute in fp32 at most; use --mamba-backend auto")
    _ = scan()
    return ssd_mamba_ssm(dtype)
