"""Batches of sequences: padding and truncation on either side."""

from __future__ import annotations

import numpy as np
import pytest

from megaforge.data.padding import pad_batch

SEQUENCES = [[1, 2, 3], [], np.array([4]), [5, 6]]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [[1, 2, 3], [0, 0, 0], [4, 0, 0], [5, 6, 0]]),
        ({"pad": 9, "padding": "left"}, [[1, 2, 3], [9, 9, 9], [9, 9, 4], [9, 5, 6]]),
        ({"length": 2, "pad": 9}, [[1, 2], [9, 9], [4, 9], [5, 6]]),
        ({"length": 2, "pad": 9, "truncation": "left"}, [[2, 3], [9, 9], [4, 9], [5, 6]]),
        ({"length": 4, "pad": 9, "padding": "left"}, [[9, 1, 2, 3], [9] * 4, [9, 9, 9, 4], [9, 9, 5, 6]]),
        ({"length": 0, "truncation": "left"}, [[], [], [], []]),
    ],
)
def test_rows_and_mask(options: dict, rows: list[list[int]]) -> None:
    ids, mask = pad_batch(SEQUENCES, **options)
    assert ids.tolist() == rows and ids.dtype == np.int64
    pad = options.get("pad", 0)
    assert (mask == (ids != pad)).all()


def test_no_sequences_and_wrong_sides() -> None:
    assert pad_batch([])[0].shape == (0, 0)
    with pytest.raises(ValueError, match="'up'"):
        pad_batch([[1]], padding="up")
