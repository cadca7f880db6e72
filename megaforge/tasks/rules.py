"""What follows a rule, whatever the length: copies and sums."""

from __future__ import annotations

from random import Random

from megaforge.tasks.example import Example, Room
from megaforge.tasks.words import Growing, distinct_words


class Copying:
    """Words to be written once more: a state of fixed size must forget some of them (Jelassi et al., arXiv
    2402.01032)."""

    metric = "exact_match"
    stops = ("\n",)

    def example(self, random: Random, room: Room) -> Example:
        """See :class:`megaforge.tasks.example.Task`."""
        words = Growing(distinct_words(random))

        def make(count: int) -> Example:
            text = " ".join(words.first(count))
            return Example(f"Text: {text}\nThe same text once more:", (text,))

        return room.fill(make)


class ModularArithmetic:
    """The value of sums and products of small numbers, from left to right, modulo 7 (as in Delétang et al., arXiv
    2207.02098): what decides is every term, so that a state must follow all of them."""

    metric = "exact_match"
    stops = ("\n",)
    modulus = 7

    def example(self, random: Random, room: Room) -> Example:
        """See :class:`megaforge.tasks.example.Task`."""
        seed = random.random()

        def make(terms: int) -> Example:
            drawn = Random(seed)
            value = drawn.randrange(self.modulus)
            shown = [str(value)]
            for _ in range(terms):
                operator, number = drawn.choice("+-*"), drawn.randrange(self.modulus)
                # A product with 0 would end what must be remembered.
                if operator in "+-":
                    value += number if operator == "+" else -number
                else:
                    number = number or 1
                    value *= number
                value %= self.modulus
                shown.append(f"{operator} {number}")
            prompt = f"From left to right, modulo {self.modulus}: {' '.join(shown)} ="
            return Example(prompt, (str(value),))

        return room.fill(make)


COPYING, MODULAR_ARITHMETIC = Copying(), ModularArithmetic()
