"""Tasks in chunks: finding, following and adding up what single chunks say."""

from __future__ import annotations

from operator import add, mul, sub
from random import Random

from megaforge.tasks.chunked import ABSENT, ASK, Asked, Piece, Told

KEYS = tuple(f"k{number}" for number in range(64))
VALUES = tuple(f"v{number}" for number in range(16))
VARIABLES = tuple(f"x{number}" for number in range(32))
DIGITS = tuple(map(str, range(10)))
_SIGNS = (("+", add), ("-", sub), ("*", mul))


class KeyValues:
    """The value of a key that one of the chunks tells; each tells three pairs. Other keys may be told again."""

    least, can_lack = 1, True
    pairs = 3

    def own_words(self) -> tuple[str, ...]:
        return (*KEYS, *VALUES)

    def told(self, random: Random, chunks: int, lacking: bool) -> Told:
        """See :class:`megaforge.tasks.chunked.ChunkedTask`."""
        asked = random.choice(KEYS)
        others = [key for key in KEYS if key != asked]
        pieces: list[list[Piece]] = [
            [(key, random.choice(VALUES)) for key in random.sample(others, self.pairs)] for _ in range(chunks)
        ]
        chunk, place, value = random.randrange(chunks), random.randrange(self.pairs), random.choice(VALUES)
        if not lacking:
            pieces[chunk][place] = (asked, value)
        first = Asked((ASK, asked), (ABSENT,)) if lacking else Asked((ASK, asked), (value,), {(chunk, place)})
        return Told(pieces, first, self._further(random, pieces, asked))

    def _further(self, random: Random, pieces: list[list[Piece]], asked: str) -> list[Asked]:
        """Of each key that is told once, and of as many that are not told, in any order."""
        places: dict[str, list[tuple[int, int]]] = {}
        for chunk, own in enumerate(pieces):
            for place, (key, _) in enumerate(own):
                places.setdefault(key, []).append((chunk, place))
        known = [
            Asked((ASK, key), pieces[chunk][place][1:], {(chunk, place)})
            for key, ((chunk, place), *again) in places.items()
            if not again and key != asked
        ]
        others = [key for key in KEYS if key not in places and key != asked]
        found = known + [Asked((ASK, key), (ABSENT,)) for key in random.sample(others, min(len(others), len(known)))]
        random.shuffle(found)
        return found


class NeedleInChunks:
    """The value of a key that is told in one chunk; others say nothing (needle in a haystack, as RULER has it, Hsieh
    et al., arXiv 2404.06654)."""

    least, can_lack = 1, True

    def own_words(self) -> tuple[str, ...]:
        return (*KEYS, *VALUES)

    def told(self, random: Random, chunks: int, lacking: bool) -> Told:
        """See :class:`megaforge.tasks.chunked.ChunkedTask`."""
        key, chunk, value = random.choice(KEYS), random.randrange(chunks), random.choice(VALUES)
        pieces: list[list[Piece]] = [[] for _ in range(chunks)]
        if lacking:
            return Told(pieces, Asked((ASK, key), (ABSENT,)))
        pieces[chunk].append((key, value))
        return Told(pieces, Asked((ASK, key), (value,), {(chunk, 0)}))


class TrackingInChunks:
    """The value of a variable that got it from another one, which got it from another one (variable tracking of RULER,
    four hops). A chunk has at most one assignment; the others are of other chains, of which the last may be short."""

    hops, most_chains = 4, 4
    least, can_lack = hops + 2, True

    def own_words(self) -> tuple[str, ...]:
        return (*VARIABLES, *VALUES, "=")

    def told(self, random: Random, chunks: int, lacking: bool) -> Told:
        """See :class:`megaforge.tasks.chunked.ChunkedTask`."""
        size = self.hops + 1
        lines = min(chunks, size * self.most_chains)
        names, values = random.sample(VARIABLES, lines), random.sample(VALUES, self.most_chains)
        owners = [line // size for line in range(lines)]  # the first chain is asked for
        told = [
            (name, "=", names[line - 1] if line % size else values[line // size]) for line, name in enumerate(names)
        ]
        lost = random.randrange(size) if lacking else None
        random.shuffle(owners)
        ahead = [iter(range(chain * size, lines)) for chain in range(self.most_chains)]
        pieces: list[list[Piece]] = [[] for _ in range(chunks)]
        needed = set()
        for chunk, chain in zip(sorted(random.sample(range(chunks), lines)), owners, strict=True):
            line = next(ahead[chain])
            if line != lost:
                pieces[chunk].append(told[line])
                needed |= {(chunk, 0)} if line < size else set()
        return Told(pieces, Asked((ASK, names[size - 1]), (ABSENT,) if lacking else (values[0],), needed))


class RecallInChunks:
    """The values of four keys, in the order in which they are asked for (multi-query associative recall of Zoology,
    Arora et al., arXiv 2312.04927)."""

    least, can_lack = 1, False
    pairs, most_queries = 3, 4

    def own_words(self) -> tuple[str, ...]:
        return (*KEYS, *VALUES)

    def told(self, random: Random, chunks: int, lacking: bool) -> Told:
        """See :class:`megaforge.tasks.chunked.ChunkedTask`."""
        queries = min(self.most_queries, self.pairs * chunks)
        asked = random.sample(KEYS, queries)
        others = [key for key in KEYS if key not in asked]
        pieces: list[list[Piece]] = [
            [(key, random.choice(VALUES)) for key in random.sample(others, self.pairs)] for _ in range(chunks)
        ]
        places = random.sample([(chunk, place) for chunk in range(chunks) for place in range(self.pairs)], queries)
        values = random.choices(VALUES, k=queries)
        for key, value, (chunk, place) in zip(asked, values, places, strict=True):
            pieces[chunk][place] = (key, value)
        return Told(pieces, Asked((ASK, *asked), tuple(values), set(places)))


class RunningSum:
    """The sum of a digit of each chunk, modulo 10: every chunk decides."""

    least, can_lack = 1, False

    def own_words(self) -> tuple[str, ...]:
        return (*DIGITS, "+", "sum")

    def told(self, random: Random, chunks: int, lacking: bool) -> Told:
        """See :class:`megaforge.tasks.chunked.ChunkedTask`."""
        digits = [random.randrange(10) for _ in range(chunks)]
        return Told([[("+", str(digit))] for digit in digits], Asked((ASK, "sum"), (str(sum(digits) % 10),)))


class ArithmeticInChunks:
    """The value, modulo 10, of a number to which each further chunk adds, from which it takes, or which it multiplies
    (after Delétang et al., arXiv 2207.02098). Nothing is multiplied by an even number or by 5, which would lose what
    came before."""

    least, can_lack = 1, False
    _FACTORS = (1, 3, 7, 9)

    def own_words(self) -> tuple[str, ...]:
        return (*DIGITS, "+", "-", "*", "=", "result")

    def told(self, random: Random, chunks: int, lacking: bool) -> Told:
        """See :class:`megaforge.tasks.chunked.ChunkedTask`."""
        value = random.randrange(10)
        pieces: list[list[Piece]] = [[("=", str(value))]]
        for _ in range(chunks - 1):
            sign, apply = random.choice(_SIGNS)
            number = random.choice(self._FACTORS) if apply is mul else random.randrange(10)
            value = apply(value, number) % 10
            pieces.append([(sign, str(number))])
        return Told(pieces, Asked((ASK, "result"), (str(value),)))


KV_CHUNKS, NEEDLE_CHUNKS, TRACKING_CHUNKS = KeyValues(), NeedleInChunks(), TrackingInChunks()
RECALL_CHUNKS, RUNNING_SUM, ARITHMETIC_CHUNKS = RecallInChunks(), RunningSum(), ArithmeticInChunks()
