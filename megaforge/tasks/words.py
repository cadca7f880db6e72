"""Words and sentences that mean nothing, for examples to be made of."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

_CONSONANTS, _VOWELS = "bdfghklmnprstvwz", "aeiou"
_SUBJECTS = ("The miller", "A sailor", "My neighbour", "The old teacher", "Our cook", "The gardener", "A stranger")
_VERBS = ("counted", "painted", "carried", "forgot", "repaired", "sold", "admired", "lost")
_OBJECTS = ("the boats", "a wooden chair", "three baskets", "the red lamp", "some letters", "a bag of flour", "the map")
_PLACES = ("by the river", "in the morning", "near the station", "after the rain", "behind the house", "on the hill")


def distinct_words(random: Random) -> Iterator[str]:
    """Made-up words of two syllables, no two alike, then of three."""
    seen: set[str] = set()
    syllables = 2
    while True:
        if len(seen) > (len(_CONSONANTS) * len(_VOWELS)) ** syllables // 2:
            syllables += 1
        word = "".join(random.choice(_CONSONANTS) + random.choice(_VOWELS) for _ in range(syllables))
        if word not in seen:
            seen.add(word)
            yield word


def sentences(random: Random) -> Iterator[str]:
    """Sentences without an end."""
    while True:
        parts = (random.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES))
        yield " ".join(parts) + "."


class Growing:
    """A list that an iterator fills as far as it is asked for: the first n of it never change."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source, self._known = source, list[str]()

    def first(self, count: int) -> list[str]:
        """The first ``count``."""
        while len(self._known) < count:
            self._known.append(next(self._source))
        return self._known[:count]


def scattered(random: Random, filler: list[str], wanted: list[str]) -> list[str]:
    """``filler`` with ``wanted`` in it, in their order, anywhere."""
    places = sorted(random.randint(0, len(filler)) for _ in wanted)
    out: list[str] = []
    last = 0
    for place, text in zip(places, wanted, strict=True):
        out += [*filler[last:place], text]
        last = place
    return out + filler[last:]
