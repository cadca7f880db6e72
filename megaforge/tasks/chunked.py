"""Tasks whose text comes chunk by chunk, of which a model sees a few at a time: what a memory is for.

Their words are few, so that each can be a token of a small vocabulary (tools/make_task_tokenizer.py). A text is words
with one space between.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from megaforge.errors import UserError
from megaforge.registry import CHUNKED_TASKS

ABSENT = "absent"  # what is answered where the text does not say
ASK = "ask"  # a question's first word
FILLER = tuple(f"n{number}" for number in range(16))  # words that say nothing
_LACKING = 0.5  # share of windows in which something is missing, or cut off

Piece = tuple[str, ...]


class Asked(NamedTuple):
    """A question and its answer, in words.

    Attributes:
        needed: (chunk, place in it) of the pieces without which there is no answer; empty where the question is about
            all that the text says, however much that is.
    """

    question: Piece
    answers: Piece
    needed: Collection[tuple[int, int]] = ()


@dataclass(frozen=True)
class Told:
    """What a text says and what is asked.

    Attributes:
        pieces: of each chunk what it says, in this order; the words of a piece follow each other.
        asked: the question.
        further: others that the same text answers, for those who learn; their words are not in ``asked``.
    """

    pieces: Sequence[Sequence[Piece]]
    asked: Asked
    further: Sequence[Asked] = ()


class ChunkedTask(Protocol):
    """What makes examples in chunks; registered in :data:`megaforge.registry.CHUNKED_TASKS` by its name.

    Attributes:
        least: chunks of the shortest text.
        can_lack: whether a text may not say what is asked for; the answer is then :data:`ABSENT`.
    """

    least: int
    can_lack: bool

    def own_words(self) -> tuple[str, ...]:
        """Words of pieces, questions and answers."""

    def told(self, random: Random, chunks: int, lacking: bool) -> Told:
        """What so many chunks say; the same for the same ``random``. ``lacking``: not what is asked for."""


def words_of(name: str) -> tuple[str, ...]:
    """Every word that an example of the task may hold.

    Raises:
        UserError: no task has this name.
    """
    return (*FILLER, ASK, ABSENT, *_task(name).own_words())


@dataclass(frozen=True)
class ChunkedExample:
    """A long text in chunks, and a question that is known from the start.

    Attributes:
        question: what is asked.
        chunks: the text.
        answers: the words of the right answer.
    """

    question: str
    chunks: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The right answer."""
        return " ".join(self.answers)


def make_chunked(name: str, seed: int, index: int, chunks: int, tokens_per_chunk: int) -> ChunkedExample:
    """Example number ``index`` of a task, of so many chunks of so many words: a function of these arguments alone, on
    every machine.

    Raises:
        UserError: no task has this name, or there are too few chunks or words.
    """
    random = Random(f"{name} {seed} {chunks} {tokens_per_chunk} {index}")
    told = _told(name, random, chunks, lacking=False)
    texts = [" ".join(_chunk(name, random, own, tokens_per_chunk).words) for own in told.pieces]
    return ChunkedExample(" ".join(told.asked.question), tuple(texts), told.asked.answers)


class Window(NamedTuple):
    """What a model sees at once, in words: some of a text, and questions with what is right to say then."""

    text: tuple[str, ...]
    asked: tuple[tuple[Piece, Piece], ...]


def make_window(name: str, seed: int, index: int, longest: int, tokens_per_chunk: int, questions: int = 1) -> Window:
    """Window number ``index``: at most ``longest`` words of chunks, and at most so many questions, each with its answer
    or :data:`ABSENT`.

    Half of them are whole chunks that say what is asked for first. Of the others it is missing, or their beginning is
    cut off, if the task allows that. A function of these arguments alone.

    Raises:
        UserError: no task has this name, or there is too little room for the shortest text.
        ValueError: not one question, or chunks of nothing.
    """
    if questions < 1 or tokens_per_chunk < 1:
        raise ValueError(f"task {name}: {questions} questions about chunks of {tokens_per_chunk} words; ask for 1 of 1")
    random = Random(f"{name} window {seed} {longest} {tokens_per_chunk} {index}")
    task = _task(name)
    if longest < task.least * tokens_per_chunk:
        raise UserError(
            f"task {name}: a window of {longest} words has no room for {task.least} chunks of {tokens_per_chunk}; "
            f"give at least {task.least * tokens_per_chunk}"
        )
    count = random.randint(task.least, longest // tokens_per_chunk)
    short = task.can_lack and random.random() < _LACKING
    missing = short and random.random() < 0.5
    told = _told(name, random, count, lacking=missing)
    parts = [_chunk(name, random, own, tokens_per_chunk) for own in told.pieces]
    text = [word for part in parts for word in part.words]
    begin = random.randrange(len(text)) if short and not missing else 0
    asked = []
    for one in (told.asked, *told.further[: questions - 1]):
        begun = [chunk * tokens_per_chunk + parts[chunk].places[piece] for chunk, piece in one.needed]
        asked.append((one.question, (ABSENT,) if any(place < begin for place in begun) else one.answers))
    return Window(tuple(text[begin:]), tuple(asked))


def _task(name: str) -> ChunkedTask:
    task: ChunkedTask = CHUNKED_TASKS.get(name)
    return task


def _told(name: str, random: Random, chunks: int, lacking: bool) -> Told:
    task = _task(name)
    if chunks < task.least:
        raise UserError(f"task {name}: {chunks} chunks are too few; give at least {task.least}")
    return task.told(random, chunks, lacking)


class _Chunk(NamedTuple):
    words: list[str]
    places: list[int]  # of the first words of its pieces


def _chunk(name: str, random: Random, pieces: Sequence[Piece], length: int) -> _Chunk:
    """The pieces in their order among words that say nothing, ``length`` words in all."""
    free = length - sum(map(len, pieces))
    if free < 0:
        raise UserError(f"task {name}: a chunk of {length} words is too short; give at least {length - free}")
    before = sorted(random.randint(0, free) for _ in pieces)
    filler = random.choices(FILLER, k=free)
    words: list[str] = []
    places = []
    used = 0
    for piece, place in zip(pieces, before, strict=True):
        words += filler[used:place]
        places.append(len(words))
        words += piece
        used = place
    return _Chunk(words + filler[used:], places)
