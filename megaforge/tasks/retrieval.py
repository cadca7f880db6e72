"""Finding what stood somewhere in a long text: a pass key, a needle among others, values of many keys."""

from __future__ import annotations

from random import Random

from megaforge.tasks.example import Example, Room
from megaforge.tasks.words import Growing, distinct_words, scattered, sentences

_LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class PassKey:
    """A number among repeated sentences (Mohtashami and Jaggi, arXiv 2305.16300)."""

    metric = "contains"
    stops = ("\n",)

    def example(self, random: Random, room: Room) -> Example:
        """See :class:`megaforge.tasks.example.Task`."""
        key, depth = str(random.randint(10000, 99999)), random.random()

        def make(lines: int) -> Example:
            before = round(depth * lines)
            told = f"The pass key is {key}. Remember it. {key} is the pass key."
            text = [_LINE] * before + [told] + [_LINE] * (lines - before)
            intro = "There is important information hidden in a lot of text. Find it and remember it."
            return Example("\n".join([intro, *text, "What is the pass key? The pass key is"]), (key,))

        return room.fill(make, least=0)


class Needle:
    """One of four sentences that tell numbers of words, among sentences of other things (multi-key needles of RULER,
    Hsieh et al., arXiv 2404.06654)."""

    metric = "contains"
    stops = ("\n",)
    needles = 4

    def example(self, random: Random, room: Room) -> Example:
        """See :class:`megaforge.tasks.example.Task`."""
        words = Growing(distinct_words(random)).first(self.needles)
        numbers = random.sample(range(10000, 100000), self.needles)
        asked = random.randrange(self.needles)
        told = [f"The magic number of {word} is {number}." for word, number in zip(words, numbers, strict=True)]
        filler, places = Growing(sentences(random)), random.random()

        def make(count: int) -> Example:
            text = scattered(Random(places), filler.first(count), told)
            question = f"What is the magic number of {words[asked]}? The magic number of {words[asked]} is"
            return Example(" ".join(text) + "\n" + question, (str(numbers[asked]),))

        return room.fill(make, least=0)


class Recall:
    """Values of several of many keys (multi-query associative recall of Zoology, Arora et al., arXiv 2312.04927)."""

    metric = "contains"
    stops = ("\n",)
    most_queries = 4

    def example(self, random: Random, room: Room) -> Example:
        """See :class:`megaforge.tasks.example.Task`."""
        words, order = Growing(distinct_words(random)), random.random()

        def make(pairs: int) -> Example:
            drawn = Random(order)
            keys = words.first(pairs)
            values = [str(drawn.randint(100, 999)) for _ in keys]
            asked = drawn.sample(range(pairs), min(pairs, self.most_queries))
            told = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
            prompt = f"{told}.\nThe numbers of {', '.join(keys[place] for place in asked)}, in this order:"
            return Example(prompt, tuple(values[place] for place in asked))

        return room.fill(make)


PASSKEY, NEEDLE, RECALL = PassKey(), Needle(), Recall()
