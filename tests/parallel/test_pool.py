"""The pool that the parallel tests run on: a rank that is lost must not stop the tests."""

from __future__ import annotations

import os

import pytest

from tests.parallel.pool import RankPool


class Unreadable:
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return int, ("not a number",)


def test_a_lost_rank_fails_the_test_that_lost_it_and_no_other() -> None:
    pool = RankPool()
    with pytest.raises(AssertionError, match="rank 0:\nno answer; exit code 3"):
        pool.run(1, os._exit, 3)
    with pytest.raises(AssertionError, match="invalid literal for int"):
        pool.run(1, print, Unreadable())
    assert pool.run(1, abs, -2) == [2]
    pool.close()
