"""Arithmetic progressions as data."""

from __future__ import annotations

import numpy as np
import pytest

from megaforge.config.cli import parse_config
from megaforge.data.progressions import PROGRESSIONS, STRIDES
from megaforge.errors import UserError

LINE = ("--seq-length", "16", "--train-iters", "2", "--vocab-size", "12")


def sample(k: int, *flags: str) -> np.ndarray:
    source = PROGRESSIONS.open(parse_config([*LINE, "--data-path", "progressions://11", *flags]).config, None)
    tokens, marks = np.empty(17, dtype=np.int64), np.empty(17, dtype=bool)
    assert source.fill(k, tokens, marks) == 16 and marks.tolist() == [True] + [False] * 16
    return tokens


def test_each_sample_is_a_progression_of_its_own() -> None:
    found = [sample(k) for k in range(50)]
    for tokens in found:
        (stride,) = set(np.diff(tokens) % 11)
        assert 1 <= stride <= STRIDES and 0 <= tokens.min() and tokens.max() < 11
    assert len({tuple(tokens) for tokens in found}) > 25
    assert len({tokens[1] - tokens[0] for tokens in found}) > 5
    assert (sample(3) == found[3]).all() and any((sample(k, "--seed", "9") != found[k]).any() for k in range(5))
    source = PROGRESSIONS.open(parse_config([*LINE, "--data-path", "progressions://11"]).config, None)
    tokens, marks = np.empty(17, dtype=np.int64), np.empty(17, dtype=bool)
    others = []
    for k in range(5):
        source.validation().fill(k, tokens, marks)  # type: ignore[attr-defined]
        others.append(tuple(tokens))
    assert others != [tuple(tokens) for tokens in found[:5]]


@pytest.mark.parametrize(("path", "words"), [("1", "a number from 2"), ("x", "a number from 2"), ("13", "at least 13")])
def test_numbers_that_cannot_be(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        PROGRESSIONS.check(parse_config([*LINE, "--data-path", f"progressions://{path}"]).config)
