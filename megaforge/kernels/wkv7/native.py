"""WKV-7 as compiled operators of torch, ``megaforge::wkv7`` and ``megaforge::wkv7_backward``.

Here are their schemas, shapes and autograd. The code is in ``csrc/wkv7``: its CPU and CUDA modules register one
implementation each for the same two operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.kernels.native import define, load
from megaforge.kernels.wkv7.reference import state_dtype

SIX = "Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor a, Tensor b"


class Saving(NamedTuple):
    """What the forward pass on a device keeps for the backward pass, besides the inputs."""

    state_interval: int  # tokens from one kept state to the next
    removed: bool  # whether S_{t-1} a_t is kept, too


FEW_TOKENS = 64  # from one kept state to the next; on GPUs in the inputs' type, and those between are computed again
# "meta" is how plans and dry runs see the GPUs that they are about.
SAVING = {"cpu": Saving(64, True), "cuda": Saving(FEW_TOKENS, False), "meta": Saving(FEW_TOKENS, False)}
MANY = Saving(16, False)  # on GPUs: of every chunk of tokens, in fp32
STATES_BETWEEN = FEW_TOKENS // MANY.state_interval - 2  # computed again at a time, of every head, in fp32
CUDA_CHANNELS = (32, 64)


def takes(device_type: str, dtype: torch.dtype, channels: int) -> bool:
    """Whether there is compiled code for ``device_type``, and it takes values of ``dtype`` in heads of ``channels``."""
    if device_type not in COMPILED:
        return False
    return device_type == "cpu" or (dtype != torch.float64 and channels in CUDA_CHANNELS)


def wkv7_native(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
    *,
    saving: Saving | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as :func:`megaforge.kernels.wkv7.wkv7`, by compiled code, which must be available.

    ``saving``: what is kept for the backward pass; None: as :data:`SAVING` has it.
    """
    dtype, y_dtype = state_dtype(v.dtype), v.dtype
    inputs = [x if x.dtype in (dtype, _also(dtype)) else x.to(dtype) for x in (r, log_w, k, v, a, b)]
    saving = saving or SAVING[v.device.type]
    differentiable = (*inputs, initial_state) if initial_state is not None else inputs
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)):
        saving = Saving(0, False)
    state = None if initial_state is None else initial_state.to(dtype)
    y, final, _, _ = torch.ops.megaforge.wkv7(*inputs, state, document_start, *saving)
    return y.to(y_dtype), final


def wkv7_native16(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`wkv7_native` with the state of every 16 tokens kept, on GPUs: nothing is computed again, in 4 times the
    memory (8 times in bf16)."""
    return wkv7_native(*inputs, saving=MANY)  # type: ignore[arg-type]


def _also(dtype: torch.dtype) -> torch.dtype:
    """The other dtype that the operators take inputs in when they keep states in ``dtype``."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, v, _, _, _, _, state_interval, save_removed = arguments
    s, batch, heads, n = v.shape
    dtype = kept_dtype = state_dtype(v.dtype)
    wide = [x for place, x in enumerate(arguments[:6]) if place != 1 and x.dtype != torch.bfloat16]
    if v.device.type != "cpu" and state_interval == FEW_TOKENS and not wide:
        kept_dtype = torch.bfloat16
    kept = -(-s // state_interval) if state_interval else 0
    return (
        v.new_empty(v.shape),
        v.new_empty(batch, heads, n, n, dtype=dtype),
        v.new_empty(kept, batch, heads, n, n, dtype=kept_dtype),
        v.new_empty(s if save_removed else 0, batch, heads, n, dtype=dtype),
    )


def _shapes_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, states = arguments[:6], arguments[7]
    initial = states.new_empty(states.shape[1:], dtype=state_dtype(states.dtype))
    return *(x.new_empty(x.shape) for x in inputs), initial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *six, initial_state, document_start, ctx.state_interval, _ = inputs
    _, _, states, removed = output
    ctx.save_for_backward(*six, document_start, states, removed)
    ctx.has_initial_state = initial_state is not None
    ctx.mark_non_differentiable(states, removed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None and dfinal is None:
        return (None,) * 10
    *gradients, dinitial = torch.ops.megaforge.wkv7_backward(*ctx.saved_tensors, dy, dfinal, ctx.state_interval)
    return *gradients, dinitial if ctx.has_initial_state else None, None, None, None


# y [s, b, H, N] in the dtype of v; final_state [b, H, N, N]; for the backward pass: states [ceil(s / state_interval),
# b, H, N, N], those before tokens 0, state_interval, 2 * state_interval, ... (none for state_interval 0), and removed
# [s, b, H, N], S_{t-1} a_t of every token (no tokens unless save_removed). All but y in fp32 (fp64 for fp64 inputs); on
# GPUs the states of every 64 tokens are in bf16 where all inputs but log_w are.
define(
    f"wkv7({SIX}, Tensor? initial_state, Tensor? document_start, int state_interval, bool save_removed)"
    " -> (Tensor y, Tensor final_state, Tensor states, Tensor removed)",
    _shapes, gradient=_differentiate, context=_save,
)  # fmt: skip
# Gradients in the dtypes of their inputs; the initial state's in fp32 (fp64). An absent dy or dfinal_state is zero.
define(
    f"wkv7_backward({SIX}, Tensor? document_start, Tensor states, Tensor removed, Tensor? dy, Tensor? dfinal_state,"
    " int state_interval)"
    " -> (Tensor dr, Tensor dlog_w, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor dinitial_state)",
    _shapes_backward,
)  # fmt: skip

COMPILED = load("wkv7")
