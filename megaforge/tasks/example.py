"""One example of a task, and how long it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from megaforge.errors import UserError
from megaforge.registry import TASKS


@dataclass(frozen=True)
class Example:
    """What a model is asked.

    Attributes:
        prompt: the text that it goes on from.
        answers: what is right; a metric of :data:`megaforge.registry.TEXT_METRICS` says how several count.
        space: what stands between prompt and answer where a text of both is made.
    """

    prompt: str
    answers: tuple[str, ...]
    space: str = " "

    @property
    def answer(self) -> str:
        """The right continuation, whole."""
        return self.space + " ".join(self.answers)

    @property
    def text(self) -> str:
        """The prompt and its right continuation."""
        return self.prompt + self.answer


Count = Callable[[str], int]


_NO_TEXT = 1 << 24  # a size that no text of a task has


@dataclass(frozen=True)
class Room:
    """How long prompt and answer may be together.

    Attributes:
        length: at most.
        count: how long a text is; tokens of a tokenizer.
    """

    length: int
    count: Count

    def fill(self, make: Callable[[int], Example], least: int = 1) -> Example:
        """The largest example ``make(n)``, n from ``least`` on, that fits; sizes must grow with n.

        Raises:
            UserError: the smallest does not.
            ValueError: one as large as any text that could be asked for does: sizes do not grow.
        """
        best, low, high = make(least), least, least + 1
        if (need := self.count(best.text)) > self.length:
            raise UserError(f"an example has at least {need} tokens, more than {self.length}; give a larger length")
        while self.count((tried := make(high)).text) <= self.length:
            best, low, high = tried, high, 2 * high
            if high > _NO_TEXT:
                raise ValueError(f"an example of size {low} has no more than {self.length} tokens: sizes must grow")
        while high - low > 1:
            middle = (low + high) // 2
            if self.count((tried := make(middle)).text) <= self.length:
                best, low = tried, middle
            else:
                high = middle
        return best


class Task(Protocol):
    """What makes examples; registered in :data:`megaforge.registry.TASKS` by its name.

    Attributes:
        metric: of :data:`megaforge.registry.TEXT_METRICS`, by which its answers are judged.
        stops: texts that end an answer.
    """

    metric: str
    stops: tuple[str, ...]

    def example(self, random: Random, room: Room) -> Example:
        """A new one, as long as ``room`` lets it be; the same for the same ``random`` and room.

        Raises:
            UserError: the room is too small for any.
        """


def make_example(name: str, seed: int, index: int, room: Room) -> Example:
    """Example number ``index`` of a task: a function of these arguments alone, on every machine.

    Raises:
        UserError: no task has this name, or the room is too small.
    """
    random = Random(f"{name} {seed} {room.length} {index}")
    task: Task = TASKS.get(name)
    try:
        return task.example(random, room)
    except UserError as error:
        raise UserError(f"task {name} at length {room.length}: {error}") from error
