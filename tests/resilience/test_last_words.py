from __future__ import annotations

from dataclasses import replace

import pytest

from megaforge.resilience.last_words import Collective, LastWords, verdict

PAIRS = {"even": (0, 2), "odd": (1, 3)}


def words(rank: int, phase: str = "step 3", **begun: tuple[int, bool]) -> LastWords:
    """``begun``: of each group, how many collectives the rank has begun, and whether it is through with the newest."""
    known = {
        group: Collective("dp", PAIRS.get(group, (0, 1, 2, 3)), number, "all_reduce [4]", done)
        for group, (number, done) in begun.items()
    }
    return LastWords(rank, f"node{rank}", phase, known, next(iter(begun), None), ("a.py:1 f", "b.py:2 g"))


def said(*spoken: LastWords) -> list[str]:
    return verdict({one.rank: one for one in spoken}, 4)


def test_words_travel_as_text() -> None:
    one = words(2, even=(7, False))
    assert LastWords.loads(one.dumps()) == one
    assert one.line() == (
        "rank 2 on node2: step 3; last collective: all_reduce [4], number 7 over dp of ranks 0, 2, not done; "
        "at a.py:1 f < b.py:2 g"
    )
    assert "none that was recorded" in words(1).line()


@pytest.mark.parametrize(
    ("spoken", "expected"),
    [
        (
            [words(0, even=(7, False)), words(1, odd=(7, True)), words(3, odd=(7, True))],
            ["rank 2 gives no sign of life: stopped, or the machine is gone"],
        ),
        (
            [words(0, even=(7, False)), words(1, odd=(6, True)), words(2, even=(7, False)), words(3, odd=(7, False))],
            ["rank 1 did not come to all_reduce [4], number 7 over dp"],
        ),
        (
            [words(0, world=(9, False)), words(1, world=(9, False)), words(2, world=(8, True)), words(3)],
            ["ranks 2, 3 did not come to all_reduce [4], number 9 over dp"],
        ),
        (
            [words(0), words(1, "save"), words(2), words(3)],
            ["rank 1 is in 'save', others in 'step 3'"],
        ),
        ([words(rank, world=(9, False)) for rank in range(4)], ["all 4 ranks wait in 'step 3'"]),
        (
            [words(0), replace(words(1), waits=False), words(2), words(3)],
            ["rank 1 waits for no other, as the rest do: it is at a.py:1 f < b.py:2 g"],
        ),
        # One that is through with its newest collective waits for nobody there.
        ([words(0, world=(9, True)), *(words(rank, world=(8, True)) for rank in (1, 2, 3))], ["all 4 ranks wait"]),
    ],
    ids=["silent", "late", "never began", "another way", "together", "busy", "ahead"],
)
def test_what_the_words_mean(spoken: list[LastWords], expected: list[str]) -> None:
    found = said(*spoken)
    assert len(found) == len(expected) and all(f.startswith(e) for f, e in zip(found, expected, strict=True)), found


def test_many_ranks_are_counted() -> None:
    assert verdict({0: words(0)}, 64)[0].startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 55 more give no sign")
