"""The tiles of ring attention, on one rank: the ring itself is in tests/parallel/context_parallel/test_shard.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megaforge.parallel.context import Axis
from megaforge.parallel.context_parallel import ring_attention as ring
from megaforge.parallel.context_parallel.shard import ContextParallelShard


@pytest.mark.parametrize("rows_at_once", [3, 4, 1024])
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_of_any_height_make_the_same_attention(
    rows_at_once: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "ROWS_AT_ONCE", rows_at_once)
    # A ring of one: gradients are at home at once.
    monkeypatch.setattr(ring, "pass_on", lambda x, axis: SimpleNamespace(wait=lambda: x))
    generator = torch.Generator().manual_seed(5)
    length = 20

    def random(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = random(4), random(2), random(2)
    starts = torch.rand(2, length, generator=generator) < 0.3
    documents = starts.long().cumsum(1) if packed else None
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])[:, None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    found = ring.ring_attention(query, key, value, documents, ContextParallelShard(Axis("cp"), "p2p"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_no_mask_is_larger_than_a_tile() -> None:
    chunk = 5
    assert ring._hidden(range(10, 15), range(5), None, torch.device("cpu")) is None
    own = ring._hidden(range(10, 15), range(10, 15), None, torch.device("cpu"))
    assert own is not None and torch.equal(own, torch.ones(chunk, chunk, dtype=torch.bool).triu(1))
    documents = torch.tensor([[0] * 12 + [1] * 8])
    packed = ring._hidden(range(10, 15), range(5, 10), documents, torch.device("cpu"))
    assert (
        packed is not None
        and packed.shape == (1, 1, 1, 5, 5)
        and packed[0, 0, 0, :, 0].tolist() == [False] * 2 + [True] * 3
    )
