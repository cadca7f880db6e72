"""Following assignments from variable to variable through a long text."""

from __future__ import annotations

from random import Random

from megaforge.tasks.example import Example, Room
from megaforge.tasks.words import Growing, distinct_words, scattered, sentences


class VariableTracking:
    """Which variables have a value that one of them was given and others got from it in ``hops`` steps, beside a chain
    of another value (variable tracking of RULER, Hsieh et al., arXiv 2404.06654)."""

    metric = "contains"
    stops = ("\n",)
    hops, chains = 4, 2

    def example(self, random: Random, room: Room) -> Example:
        """See :class:`megaforge.tasks.example.Task`."""
        size = self.hops + 1
        names = [name.upper() for name in Growing(distinct_words(random)).first(size * self.chains)]
        values = random.sample(range(10000, 100000), self.chains)
        told: list[list[str]] = []
        for chain, value in enumerate(values):
            own = names[chain * size : (chain + 1) * size]
            told.append(
                [f"VAR {own[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in zip(own, own[1:], strict=False))]
            )
        merged = _interleaved(random, told)
        filler, places = Growing(sentences(random)), random.random()

        def make(count: int) -> Example:
            text = scattered(Random(places), filler.first(count), merged)
            question = f"The variables that have the value {values[0]}, in the order in which they got it:"
            return Example(" ".join(text) + "\n" + question, tuple(names[:size]))

        return room.fill(make, least=0)


def _interleaved(random: Random, chains: list[list[str]]) -> list[str]:
    """All texts, those of each chain in their order."""
    turns = [number for number, chain in enumerate(chains) for _ in chain]
    random.shuffle(turns)
    left = [iter(chain) for chain in chains]
    return [next(left[turn]) for turn in turns]


VARIABLE_TRACKING = VariableTracking()
