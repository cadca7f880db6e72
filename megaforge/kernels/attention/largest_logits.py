"""The largest logit of each attention head, which the fused kernels do not tell."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 24  # elements


@torch.no_grad()
def largest_logits(
    query: Tensor, key: Tensor, ahead: int = 0, documents: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The largest ``q k^T / sqrt(d)`` of each head, over the keys that its queries see; no gradient.

    Args:
        query: [b, heads, s, d].
        key: [b, groups, t, d]; each group serves heads / groups neighbouring heads.
        ahead: places from the first key to the first query: query i sees keys 0 to i + ahead.
        documents: int64 [b, s] and [b, t], of queries and keys: a query sees keys of its own alone.

    Returns:
        [heads] in fp32 (fp64 for fp64), in which products are summed, too; -inf where no query sees a key.
    """
    (batch, heads, length, width), (groups, keys) = query.shape, key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    largest = torch.full((heads,), float("-inf"), dtype=wide, device=query.device)
    rows = max(1, SCORES_AT_ONCE // max(1, batch * heads * keys))
    key = key.to(wide).transpose(-1, -2)
    for first in range(0, length if batch else 0, rows):
        last = min(first + rows, length)
        seen = min(keys, last + ahead)
        if seen <= 0:
            continue
        block = query[:, :, first:last].to(wide).reshape(batch, groups, -1, width)
        scores = (block @ key[..., :seen]).view(batch, heads, last - first, seen)
        places = torch.arange(first + ahead, last + ahead, device=query.device)
        hidden = places[:, None] < torch.arange(seen, device=query.device)
        if documents is not None:
            own, other = documents[0][:, first:last, None], documents[1][:, None, :seen]
            hidden = (hidden | (own != other))[:, None]
        largest = torch.maximum(largest, scores.masked_fill_(hidden, float("-inf")).amax((0, 2, 3)))
    return largest * width**-0.5
