"""Document boundaries of a micro-batch."""

from __future__ import annotations

import pytest
import torch

from megaforge.parallel.context import Axis
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.packed_sequence import PackedSequence

CPU = torch.device("cpu")


def test_boundaries_restart_positions_and_close_the_mask() -> None:
    start = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    info = PackedSequence(2, 5, CPU, start)
    assert info.has_boundaries
    assert info.position_ids_BS.tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]
    assert info.document_ids_BS.tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]]
    assert info.document_start_SB.t().tolist() == [[True, False, True, False, True], [True, False, False, False, False]]
    mask = info.attention_mask()
    assert mask is not None and mask.shape == (2, 1, 5, 5)
    for query in range(5):
        for key in range(5):
            same = info.document_ids_BS[0, query] == info.document_ids_BS[0, key]
            assert bool(mask[0, 0, query, key]) == bool(same and key <= query)
    assert torch.equal(mask[1, 0], torch.ones(5, 5, dtype=torch.bool).tril())


def test_a_start_at_position_zero_is_no_boundary() -> None:
    start = torch.zeros(2, 4, dtype=torch.bool)
    start[:, 0] = True
    info = PackedSequence(2, 4, CPU, start)
    assert not info.has_boundaries and info.attention_mask() is None
    assert info.document_start_SB[0].all() and not info.document_start_SB[1:].any()


def test_a_continued_sequence_counts_on() -> None:
    info = PackedSequence(1, 3, CPU, None, offset=7)
    assert info.position_ids_BS.tolist() == [[7, 8, 9]]
    assert not info.document_start_SB.any()
    with pytest.raises(ValueError, match="continues"):
        PackedSequence(1, 3, CPU, torch.zeros(1, 3, dtype=torch.bool), offset=7)
    with pytest.raises(ValueError, match="shape"):
        PackedSequence(2, 3, CPU, torch.zeros(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_ranks_that_share_sequences_describe_their_own_tokens_of_the_whole(size: int, packed: bool) -> None:
    length = 4 * size
    start = torch.zeros(2, length, dtype=torch.bool)
    start[0, [2, 5, length - 1]] = packed
    whole = PackedSequence(2, length, CPU, start)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = whole.attention_mask() if packed else causal[None, None]
    assert mask is not None
    for rank in range(size):
        first, last = 2 * rank, 2 * (2 * size - 1 - rank)  # of the two chunks of two tokens each
        own = torch.tensor([first, first + 1, last, last + 1])
        info = PackedSequence(2, length, CPU, start, shards=ContextParallelShard(Axis("cp", size, rank)))
        assert (info.batch, info.length, info.has_boundaries) == (2, 4, packed)
        assert torch.equal(info.positions_S, own)
        assert torch.equal(info.position_ids_BS, whole.position_ids_BS[:, own])
        assert torch.equal(info.document_ids_BS, whole.document_ids_BS[:, own])
        assert torch.equal(info.document_start_SB, whole.document_start_SB[own])
        assert torch.equal(info.local(start), start[:, own])
        assert info.attention_mask() is not None and torch.equal(info.attention_mask(), mask[:, :, own])


def test_sequences_that_cannot_be_shared() -> None:
    shards = ContextParallelShard(Axis("cp", 2, 0))
    with pytest.raises(ValueError, match="2 x cp = 4"):
        PackedSequence(1, 6, CPU, shards=shards)
    with pytest.raises(ValueError, match="continues from a state"):
        PackedSequence(1, 8, CPU, offset=1, shards=shards)


def test_segments_on_meta_need_no_numbers_of_the_device() -> None:
    start = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    for given in (start, None):
        here, there = (PackedSequence(2, 5, torch.device(kind), given) for kind in ("cpu", "meta"))
        found = there.segments(range(5), range(5))
        assert torch.equal(found, here.segments(range(5), range(5))) and found is there.segments(range(5), range(5))
        assert len(found) == (4 if given is not None else 2)


def test_selected_tokens_keep_their_positions_and_begin_their_documents() -> None:
    start = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    info = PackedSequence(2, 6, CPU, start)
    info.attention_mask()
    some = info.select(torch.tensor([[1, 0], [3, 2], [5, 3]]))
    assert some.position_ids_BS.tolist() == [[1, 1, 1], [0, 2, 3]] and some.length == 3
    assert some.document_ids_BS.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert some.document_start_SB.t().tolist() == [[True, True, True], [True, False, False]]
    mask = some.attention_mask()
    assert mask is not None and torch.equal(mask[0, 0], torch.eye(3, dtype=torch.bool))
    assert torch.equal(mask[1, 0], torch.ones(3, 3, dtype=torch.bool).tril())
    assert info.length == 6 and info.attention_mask().shape == (2, 1, 6, 6)  # type: ignore[union-attr]
    every = info.select(torch.arange(6)[:, None].expand(6, 2))
    assert torch.equal(every.attention_mask(), info.attention_mask())  # type: ignore[arg-type]
    assert PackedSequence(1, 4, CPU).select(torch.tensor([[2]])).attention_mask() is None
    with pytest.raises(ValueError, match="whole sequences"):
        PackedSequence(1, 3, CPU, None, offset=7).select(torch.tensor([[0]]))
    filled = info.select(torch.tensor([[1, 0], [5, 2], [0, 3], [2, 4]]))  # behind the fifth and, never, what fills up
    assert filled.document_ids_BS.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert filled.document_start_SB.t().tolist() == [[True] * 4, [True, False, False, False]]


def test_ranks_share_selected_tokens_as_they_share_whole_sequences() -> None:
    start = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 1]], dtype=torch.bool)
    own = PackedSequence(1, 8, CPU, start, shards=shard_of_two()).select(torch.tensor([[0], [2], [3], [6]]))
    assert own.position_ids_BS.tolist() == [[0, 3]] and own.document_ids_BS.tolist() == [[0, 1]]
    assert own.document_start_SB.t().tolist() == [[True, False]] and own.positions_S.tolist() == [0, 3]
    assert own.all_document_ids_BS.tolist() == [[0, 0, 1, 1]]


def shard_of_two() -> ContextParallelShard:
    return ContextParallelShard(Axis("cp", size=2))
