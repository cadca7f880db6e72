"""WKV-7, the recurrence of RWKV-7 (Peng et al., arXiv 2503.14456), for one decay, key and value per channel.

Per head, with a state S of [value, key] channels::

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

:func:`wkv7` is the face. :func:`wkv7_recurrent` is the definition, token by token: the oracle of the others.
:mod:`.native` is compiled code, used where there is some for the tensors' device; :mod:`.chunked` is plain torch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megaforge.kernels.native import say_uncompiled
from megaforge.kernels.wkv7.chunked import CHUNK, wkv7_chunked, wkv7_state_gradient, wkv7_summary
from megaforge.kernels.wkv7.native import takes, wkv7_native
from megaforge.kernels.wkv7.reference import state_dtype, wkv7_recurrent

__all__ = [
    "CHUNK", "state_dtype", "wkv7", "wkv7_chunked", "wkv7_recurrent", "wkv7_state_gradient",
    "wkv7_summary", "wkv7_torch",
]  # fmt: skip


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """WKV-7 over whole sequences, differentiable in every floating-point argument.

    Args:
        r, k, v, a, b: [s, b, H, N], any floating-point dtype. RWKV-7 calls it with a = -kk and b = kk * (in-context
            learning rate).
        log_w: [s, b, H, N], logarithm of the decay; RWKV-7's lies in (-exp(-0.5), 0). Compiled code takes any; the
            chunked path is exact to rounding down to -2 a token and overflows from -2.7 on, far beyond RWKV-7's.
        initial_state: [b, H, N (value), N (key)], zero when None.
        document_start: bool [s, b]; the state is zero before a token where it is true.

    Returns:
        y [s, b, H, N] in the dtype of ``v`` and the final state [b, H, N, N], kept in fp32 (fp64 for fp64 inputs).
    """
    device = v.device.type
    if takes(device, v.dtype, v.shape[-1]):
        return wkv7_native(r, log_w, k, v, a, b, initial_state, document_start)
    if device != "meta":
        say_uncompiled("wkv7", device)
    return wkv7_torch(r, log_w, k, v, a, b, initial_state, document_start)


def wkv7_torch(r: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`wkv7`, in plain torch on any device."""
    function: Any = wkv7_recurrent if r.shape[0] <= 2 else wkv7_chunked
    return function(r, *others)
