"""What ring attention makes of blocks of keys, on one rank: the ring itself is in tests/parallel/context_parallel/
test_shard.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megaforge.kernels.attention.segments import documents_of, segments_of
from megaforge.parallel.context import Axis
from megaforge.parallel.context_parallel import ring_attention as ring
from megaforge.parallel.context_parallel.shard import ContextParallelShard


@pytest.mark.parametrize("packed", [False, True])
def test_parts_make_the_same_attention(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A ring of one: gradients are at home at once.
    monkeypatch.setattr(ring, "pass_on", lambda x, axis: SimpleNamespace(wait=lambda: x))
    generator = torch.Generator().manual_seed(5)
    length = 20

    def random(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = random(4), random(2), random(2)
    starts = torch.rand(2, length, generator=generator) < 0.3
    ids = starts.long().cumsum(1) * packed
    visible = (ids[:, :, None] == ids[:, None, :]).tril()[:, None]
    documents = documents_of(ids)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    found = ring.ring_attention(
        query,
        key,
        value,
        lambda rows, keys: segments_of(documents, rows, keys),
        ContextParallelShard(Axis("cp"), "p2p"),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
