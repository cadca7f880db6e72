"""Which float32 matmul precision torch runs at on this machine, decided by measuring its error.

``torch.set_float32_matmul_precision("medium")`` allows bfloat16 products. On many CPUs it instead selects oneDNN's own
kernels, which are still fp32 and about twice as fast as MKL's on AMD processors; on CPUs with AMX the same switch does
mean bfloat16. So it is checked, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

TOLERANCE = 1e-6  # relative error (Frobenius norm) that still counts as fp32
SHAPES = ((256, 512, 512), (2048, 512, 256), (37, 1030, 131))  # rows, inner, columns


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """torch at this float32 matmul precision, and afterwards as it was.

    Where another package has set some of torch's switches by their older names (rwkv: ``allow_tf32``), torch refuses to
    say at which precision it is, but not to be set; then the devices' own precisions are all that is put back.
    """
    devices = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    own = [device.fp32_precision for device in devices]
    try:
        before: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = None
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for device, value in zip(devices, own, strict=True):
            device.fp32_precision = value


def matmul_error(precision: str) -> float:
    """The largest relative error of float32 products on the CPU at ``precision``, against float64.

    Covers the forms of training: ``x W^T`` (2-D and 3-D), ``g W`` and ``g^T x``, and batched products. Leaves torch's
    setting as it was.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    with matmul_precision(precision):
        for rows, inner, columns in SHAPES:
            x = torch.randn(rows, inner, generator=generator)
            weight = torch.randn(columns, inner, generator=generator)
            grad = torch.randn(rows, columns, generator=generator)
            x64, weight64, grad64 = x.double(), weight.double(), grad.double()
            exact = x64 @ weight64.T
            for ours, theirs in (
                (F.linear(x, weight), exact),
                (F.linear(x.unsqueeze(1), weight).squeeze(1), exact),
                (torch.bmm(x.unsqueeze(0), weight.T.unsqueeze(0))[0], exact),
                (grad @ weight, grad64 @ weight64),
                (grad.T @ x, grad64.T @ x64),
            ):
                worst = max(worst, float((ours.double() - theirs).norm() / theirs.norm()))
    return worst


def choose_matmul_precision(requested: str, device: torch.device | str = "cpu") -> str:
    """Sets torch's float32 matmul precision and returns it.

    Args:
        requested: ``highest``, ``high`` or ``medium`` are taken as they are. ``auto`` is ``medium`` on a CPU where
            :func:`matmul_error` shows it exact to :data:`TOLERANCE`, otherwise ``highest``.
        device: where the model computes.
    """
    precision = requested
    if requested == "auto":
        trusted = torch.device(device).type == "cpu" and matmul_error("medium") <= TOLERANCE
        precision = "medium" if trusted else "highest"
    torch.set_float32_matmul_precision(precision)
    return precision
