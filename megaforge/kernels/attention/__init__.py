"""Causal softmax attention: one face over flash attention and, where it cannot be, over what torch has.

On a CPU the compiled code of :mod:`.native` takes fp32 and bf16; documents, caches and parts of sequences are segments
(:mod:`.segments`), and no mask exists. Without it, torch's fused kernel makes little of the CPU's 16-bit matrix
products; the blockwise form (:mod:`.blockwise`) is made of them. All need memory linear in the sequence length, but for
a mask. :mod:`.reference` has the definition.

On a GPU packed documents go through flash attention for sequences of different lengths (:func:`takes_documents`), which
skips what a mask hides and has no mask. Where that cannot be, a mask leaves torch the memory-efficient kernel, which
refuses ``enable_gqa`` (up to 2.13): the keys and values of a group are repeated, or scores of [b, heads, s, t] would
exist in fp32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.kernels.attention import native
from megaforge.kernels.attention.blockwise import BlockwiseAttention
from megaforge.kernels.attention.segments import whole
from megaforge.kernels.native import say_fallback, say_uncompiled

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

_VARLEN: Callable[..., Any] | None = varlen_attn
FEW = 8  # queries from which a cache is worth packing for the compiled code


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of b sequences of s tokens, taken as one row of b * s tokens.

    Attributes:
        bounds: int32 [documents + 1], where each begins, and the end of the last: from 0 to b * s.
        longest: tokens of the longest.
    """

    bounds: Tensor
    longest: int


def takes_segments(query: Tensor, key: Tensor) -> bool:
    """Whether :func:`causal_attention` takes segments for ``query`` [b, heads, s, d] and ``key`` [b, groups, t, d]:
    fp32 or bf16, on a CPU, and not just a few tokens after many."""
    if native.takes(query):
        return query.shape[2] == key.shape[2] or query.shape[2] >= FEW
    if query.device.type == "cpu" and query.dtype in native.DTYPES:
        say_uncompiled("attention", "cpu")
    return False


def takes_documents(query: Tensor) -> bool:
    """Whether :func:`causal_attention` takes :class:`PackedDocuments` for ``query``: 16 bits wide, on a GPU."""
    if query.device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(query.device)
    if _VARLEN is not None and flash_serves(query.dtype, query.shape[-1], capability):
        return True
    why = f"does not take {query.dtype} in heads of {query.shape[-1]} on compute capability {capability}"
    why = "is not in this torch" if _VARLEN is None else why
    say_fallback(
        "attention", f"flash attention for packed documents {why}", "a mask, whose hidden part is computed too"
    )
    return False


def flash_serves(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> bool:
    """Whether torch's flash kernels, called without the padding that ``scaled_dot_product_attention`` adds, run both
    ways on a GPU of this compute capability."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    return narrow and head_dim % 8 == 0 and head_dim <= 192 and capability >= (8, 0)


def repeats_groups(device_type: str, masked: bool) -> bool:
    """Whether keys and values that several heads share are repeated for each of them; see above."""
    return device_type == "cuda" and masked


def taken_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` as the kernels of its device take it: on a GPU not bool but what is added to scores of ``dtype``, which
    ``scaled_dot_product_attention`` would make of it at every call."""
    return additive_mask(mask, dtype) if mask.device.type == "cuda" else mask


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``mask`` is true, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    documents: PackedDocuments | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over what each query may see.

    Args:
        query: [b, heads, s, d].
        key: [b, groups, t, d]; each group serves heads / groups neighbouring heads.
        value: [b, groups, t, d].
        mask: bool, broadcastable to [b, heads, s, t], true where a query sees a key; it sees at least one. On a GPU
            also in the form of :func:`taken_mask`. None: token i sees tokens 0 to i (then s = t).
        documents: instead of a mask, where :func:`takes_documents`: a token sees those before it in its document
            (then s = t).
        segments: instead of either, where :func:`takes_segments`: int64 [n, 6] of :mod:`.segments`; a query that is in
            none of them gives zeros.

    Returns:
        [b, heads, s, d] of the dtype of ``query``; the softmax is taken in fp32 (fp64 for fp64).
    """
    if documents is not None:
        return _within_documents(query, key, value, documents)
    if segments is None and mask is None and query.shape[2] == key.shape[2] and takes_segments(query, key):
        segments = whole(query.shape[0], query.shape[2])
    if segments is not None:
        return native.attention(query, key, value, segments)
    grouped = key.shape[1] != query.shape[1]
    kind = query.device.type
    blockwise = kind == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] == key.shape[2]
    if grouped and mask is not None and query.shape[2] == 1 and mask.shape[:-1].numel() in (1, mask.shape[0]):
        # The heads of a group are as many queries of its keys: nothing is repeated.
        rows = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask).view(query.shape)
    if grouped and (blockwise or repeats_groups(kind, mask is not None)):
        repeats, grouped = query.shape[1] // key.shape[1], False
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if blockwise:
        return BlockwiseAttention.apply(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def _within_documents(query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
    """torch's ``varlen_attn``, whose words for causal and for groups differ between 2.11 and 2.13."""
    assert _VARLEN is not None
    words = inspect.signature(_VARLEN).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in words else {"is_causal": True}
    batch, heads, length, width = query.shape
    rows = [x.transpose(1, 2).reshape(batch * length, -1, width) for x in (query, key, value)]
    if key.shape[1] != heads:
        if "enable_gqa" in words:
            options["enable_gqa"] = True
        else:
            rows[1:] = [x.repeat_interleave(heads // key.shape[1], dim=1) for x in rows[1:]]
    bounds, longest = documents.bounds, documents.longest
    out: Tensor = _VARLEN(*rows, bounds, bounds, longest, longest, **options)
    return out.view(batch, length, heads, width).transpose(1, 2)
