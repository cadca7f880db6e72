"""Reads that fail for a moment are repeated; others end with the file's name."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from megaforge.data import patience
from megaforge.data.patience import Patience
from megaforge.errors import UserError


def failing(times: int) -> Any:
    left = [times]

    def fill(k: int, tokens: Any, marks: Any) -> int:
        tokens[:], marks[:] = k, True
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error", "corpus.bin")
        marks[1] = False
        return 3

    return fill


def test_repeated_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    told: list[dict[str, Any]] = []
    tokens, marks = np.zeros(4, np.int64), np.zeros(4, np.bool_)
    reading = Patience(3, lambda **fields: told.append(fields))
    assert reading.fill(failing(3))(7, tokens, marks) == 3
    assert tokens.tolist() == [7] * 4 and marks.tolist() == [True, False, True, True]
    assert waits == [0.5, 1.0, 2.0]
    assert told[0] == {"what": "sample 7", "error": "Input/output error: corpus.bin", "attempt": 1}
    with pytest.raises(UserError, match=r"sample 7 cannot be read \(4 times\): Input/output error: corpus.bin"):
        reading.fill(failing(4))(7, tokens, marks)
    with pytest.raises(UserError, match="sample 7 cannot be read: Input"):
        Patience(0, lambda **fields: None).fill(failing(1))(7, tokens, marks)
    with pytest.raises(KeyError):  # what is no read error is not repeated
        reading.repeat(lambda: {}["x"], "a mistake")
