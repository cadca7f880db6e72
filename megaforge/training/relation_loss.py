"""Relations of queries with queries, keys with keys and values with values: what attention layers of two models have in
common whatever their widths (MiniLMv2, Wang et al., arXiv 2012.15828; of 1.58-bit students BitDistill, 2510.13998)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.nn.recompute import recomputed


def relation_divergence(ours: Sequence[Tensor], theirs: Sequence[Tensor], visible_BSS: Tensor) -> Tensor:
    """Sum over all tokens of the divergences, mean over this rank's heads of a kind of vectors, and over the kinds.

    Args:
        ours, theirs: of each kind [b, heads, s, width], the same heads, any widths; only ``ours`` get a gradient.
        visible_BSS: bool [b or 1, s, s], which tokens each token is compared with.

    Returns:
        A scalar, fp32 (fp64 for fp64).
    """
    pairs = zip(ours, theirs, strict=True)
    return torch.stack(
        [recomputed(True, _divergence, a, b.detach(), visible_BSS) / a.shape[1] for a, b in pairs]
    ).mean()


def _divergence(ours: Tensor, theirs: Tensor, visible_BSS: Tensor) -> Tensor:
    own, their = (_log_relations(x, visible_BSS) for x in (ours, theirs))
    pointwise = F.kl_div(own, their, reduction="none", log_target=True)
    return pointwise.masked_fill(~visible_BSS.unsqueeze(1), 0).sum()


def _log_relations(x: Tensor, visible_BSS: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scores = wide @ wide.transpose(-1, -2) / math.sqrt(x.shape[-1])
    # A large number in place of -inf: its softmax is 0 as well, and its logarithm a number.
    return F.log_softmax(scores.masked_fill(~visible_BSS.unsqueeze(1), -1e9), dim=-1)
