"""Causal softmax attention: one face over flash attention and, where it cannot be, over what torch has.

Documents, caches and parts of sequences are segments (:mod:`.segments`): rows of queries and of the keys that they may
see. No mask of length x length exists, and memory is linear in the length:

- :mod:`.native`, compiled for CPUs, takes fp32 and bf16;
- :mod:`.varlen`, torch's flash attention for sequences of different lengths, on GPUs in 16 bits;
- torch's ``scaled_dot_product_attention`` where each token sees all earlier ones, or one query all keys;
- :mod:`.blocks`, a block of queries at a time in plain torch, for the rest.

:mod:`.reference` has the definition.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.kernels.attention import blocks, native, varlen
from megaforge.kernels.attention.segments import FEW, whole
from megaforge.kernels.native import say_fallback, say_uncompiled

__all__ = ["attention_gradients", "attention_with_lse", "causal_attention", "step_attention", "taken_mask"]


def form_for(query: Tensor, key: Tensor, segments: Tensor) -> ModuleType:
    """Which of :mod:`.native`, :mod:`.varlen` and :mod:`.blocks` takes ``query`` [b, heads, s, d] and ``key`` [b,
    groups, t, d] within ``segments``; they have the same functions."""
    if _compiled(query, key):
        return native
    if query.device.type in ("cuda", "meta"):
        why = varlen.why_not(query)
        if why is None and varlen.takes(query, key, segments):
            return varlen
        if why is not None and query.device.type == "cuda":
            what = f"flash attention for packed documents and parts of sequences {why}"
            say_fallback("attention", what, "plain torch in blocks of queries, several times slower")
    return blocks


def _compiled(query: Tensor, key: Tensor) -> bool:
    """A few tokens after many are not worth what the compiled code does first."""
    if native.takes(query):
        return query.shape[2] == key.shape[2] or query.shape[2] >= FEW
    if query.device.type == "cpu" and query.dtype in native.DTYPES:
        say_uncompiled("attention", "cpu")
    return False


def causal_attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over what each query may see.

    Args:
        query: [b, heads, s, d].
        key: [b, groups, t, d]; each group serves heads / groups neighbouring heads.
        value: [b, groups, t, d].
        segments: int64 [n, 6] of :mod:`.segments` in host memory; a query that is in none of them gives zeros. None:
            token i sees tokens 0 to i (then s = t), or one token sees all (then s = 1).

    Returns:
        [b, heads, s, d] of the dtype of ``query``; the softmax is taken in fp32 (fp64 for fp64).

    Raises:
        ValueError: several queries, other keys, and no segments; or groups that are not each of as many heads, or of
            keys and values of different tokens.
    """
    length, keys = query.shape[2], key.shape[2]
    if query.shape[1] % key.shape[1] or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"heads {list(query.shape)} of keys {list(key.shape)} and values {list(value.shape)}")
    if segments is None and length not in (1, keys):
        raise ValueError(f"{length} queries of {keys} keys need segments")
    blockwise = query.device.type == "cpu" and query.dtype == torch.bfloat16 and length == keys
    if segments is None and not blockwise and not _compiled(query, key):
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, enable_gqa=grouped)
    if segments is None:
        segments = whole(query.shape[0], length)
    out: Tensor = form_for(query, key, segments).attention(query, key, value, segments)
    return out


def taken_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Which places a token sees, bool, as :func:`step_attention` takes it: on a GPU what is added to scores of
    ``dtype``, which ``scaled_dot_product_attention`` would make of it at every call."""
    if seen.device.type != "cuda":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def step_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One token of each sequence over the places of a cache, where the device alone knows how many are in use.

    Args:
        query: [b, heads, 1, d].
        key, value: [b, groups, t, d].
        mask: [b, 1, 1, t] of :func:`taken_mask`.

    Returns:
        [b, heads, 1, d].
    """
    # The heads of a group are as many queries of its keys: nothing is repeated.
    rows = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask).view(query.shape)


@torch.no_grad()
def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Within segments, which may be a part of what the queries see: [b, heads, s, d] in fp32 (fp64), and the log of
    each query's sum of exponentials [b, heads, s], with which parts are put together: -inf where a query sees nothing.
    Not differentiable."""
    found: tuple[Tensor, Tensor] = form_for(query, key, segments).attention_with_lse(query, key, value, segments)
    return found


@torch.no_grad()
def attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, segments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in fp32 (fp64) of queries, keys and values through these segments.

    Args:
        grad, out: [b, heads, s, d], the gradient and the whole of the output, of which the segments may be a part.
        lse: of the whole output.
    """
    form = form_for(query, key, segments)
    found: tuple[Tensor, Tensor, Tensor] = form.attention_gradients(grad, query, key, value, out, lse, segments)
    return found
