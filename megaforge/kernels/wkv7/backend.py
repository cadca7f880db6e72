"""Which implementation of WKV-7 a layer calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.kernels.native import say_fallback, why_missing
from megaforge.kernels.wkv7 import wkv7, wkv7_torch
from megaforge.kernels.wkv7.fla import fla_kernels, wkv7_fla
from megaforge.kernels.wkv7.native import COMPILED, takes, wkv7_native, wkv7_native16

WKV7 = Callable[..., tuple[Tensor, Tensor]]


def wkv7_backend(name: str, device: torch.device, dtype: torch.dtype, channels: int) -> WKV7:
    """The implementation that ``--wkv-backend`` names: a function with the arguments and results of :func:`wkv7`.

    Args:
        name: auto, native, native16, fla or torch.
        device: where the tensors will be.
        dtype: the dtype of the values.
        channels: N.

    Raises:
        UserError: it cannot run here.
    """
    kind = device.type
    if name == "native16" and kind == "cpu":
        raise UserError("--wkv-backend native16 is about what GPUs keep; on cpu use --wkv-backend native")
    if name in ("native", "native16"):
        if kind not in COMPILED:
            raise UserError(
                f"--wkv-backend {name}: no compiled WKV-7 for {kind} ({why_missing('wkv7', kind)}); build it with "
                "pip install --no-build-isolation -e . or use --wkv-backend auto"
            )
        if not takes(kind, dtype, channels):
            raise UserError(
                f"--wkv-backend {name}: compiled WKV-7 for {kind} does not take {dtype} in heads of {channels} "
                "channels; use --rwkv-head-size 64 in fp32, fp16 or bf16, or --wkv-backend auto"
            )
    if name == "fla" and kind == "meta":  # a plan: what its kernels keep is known where they are, on GPUs
        say_fallback("wkv7", "--wkv-backend fla computes nothing in plans and dry runs", "the memory of auto")
        return wkv7
    if name == "fla":
        if kind != "cuda":
            raise UserError(f"--wkv-backend fla: its kernels run on GPUs, not on {kind}; use --wkv-backend auto")
        _ = fla_kernels()
    functions: dict[str, WKV7] = {
        "auto": wkv7,
        "native": wkv7_native,
        "native16": wkv7_native16,
        "fla": wkv7_fla,
        "torch": wkv7_torch,
    }
    return functions[name]
