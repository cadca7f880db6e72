"""Segments say what a mask says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.attention.segments import documents_of, segments_of, whole

IDS = torch.tensor([[0] * 20, [0] * 5 + [1] + [2] * 8 + [3] * 6, list(range(20))])


def seen(segments: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """bool [b, queries, keys], each pair from its definition."""
    found = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for sequence, query, rows, key, columns, ahead in segments.tolist():
        for i in range(rows):
            found[sequence, query + i, key : key + min(max(i + ahead + 1, 0), columns)] = True
    return found


@pytest.mark.parametrize("queries", [range(20), range(5, 10), range(15, 20)])
@pytest.mark.parametrize("keys", [range(20), range(5), range(5, 10), range(15)])
def test_any_part_of_the_queries_and_of_the_keys(queries: range, keys: range) -> None:
    visible = (IDS[:, :, None] == IDS[:, None, :]).tril()[:, queries.start : queries.stop, keys.start : keys.stop]
    segments = segments_of(documents_of(IDS), queries, keys)
    assert torch.equal(seen(segments, 3, len(queries), len(keys)), visible)
    assert (segments[:, [2, 4]] > 0).all(), "empty segments"


def test_sequences_that_continue_after_places_of_nobody() -> None:
    padding = torch.tensor([0, 3])
    documents = documents_of(torch.zeros(2, 4, dtype=torch.long), 10, padding)
    assert documents.tolist() == [[0, 0, 14], [1, 3, 14]]
    found = seen(segments_of(documents, range(10, 14), range(14)), 2, 4, 14)
    places = torch.arange(14)
    assert torch.equal(found, (places <= places[10:, None]) & (places >= padding[:, None, None]))


def test_whole_sequences() -> None:
    one = segments_of(documents_of(torch.zeros(3, 7, dtype=torch.long)), range(7), range(7))
    assert torch.equal(whole(3, 7), one) and whole(0, 7).shape == (0, 6)
