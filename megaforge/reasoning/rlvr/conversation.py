"""What a model is asked and writes until its answer is there: one prompt, or a long text chunk by chunk with a memory.

A long text is read as MemAgent does (Yu et al., arXiv 2507.02259): the model sees the memory, a chunk and the question,
and what it writes takes the memory's place; behind the last chunk it sees the memory and the question, and answers.
However long the text is, a prompt is as long as ever.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.config.rollout_config import RolloutConfig
from megaforge.data.tokenizer import Tokenizer
from megaforge.reasoning.packing import Tokens
from megaforge.reasoning.rlvr.experience import Turn
from megaforge.reasoning.rlvr.writing import Pen, Written, seed_of

_NAMES = ("memory", "chunk", "question")


class ReadingPrompt:
    """``--rl-reading-prompt`` as tokens: its own words and what stands for the names in braces are encoded apart."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        pieces = re.split("({(?:" + "|".join(_NAMES) + ")})", template)
        self._parts: list[Tokens | str] = [
            piece[1:-1] if place % 2 else tuple(tokenizer.encode(piece)) if piece.strip() else ()
            for place, piece in enumerate(pieces)
        ]

    @property
    def own(self) -> int:
        """Tokens of its own words."""
        return sum(len(part) for part in self._parts if isinstance(part, tuple))

    def filled(self, **given: Tokens) -> Tokens:
        """With tokens in the places of the names."""
        found: list[int] = []
        for part in self._parts:
            found += given[part] if isinstance(part, str) else part
        return tuple(found)


@dataclass(frozen=True)
class Asked:
    """What a model is to answer.

    Attributes:
        prompt: tokens that it goes on from; of a text that is read in chunks the question's.
        chunks: of the text; none: it is in the prompt, or there is none.
    """

    prompt: Tokens
    chunks: tuple[Tokens, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """
    Attributes:
        answer, memory: tokens of each that are written, at most.
        reading: the prompt of a chunk.
    """

    answer: int
    memory: int
    reading: ReadingPrompt

    @classmethod
    def of(cls, flags: RolloutConfig, tokenizer: Tokenizer) -> Sizes:
        """What the flags ask for."""
        return cls(flags.rl_max_new_tokens, flags.rl_memory_tokens, ReadingPrompt(flags.rl_reading_prompt, tokenizer))

    def longest(self, asked: Asked) -> int:
        """Tokens of a prompt and what is written behind it, at most."""
        if not asked.chunks:
            return len(asked.prompt) + self.answer
        fixed = self.reading.own + self.memory + len(asked.prompt)
        return fixed + max(max(map(len, asked.chunks)) + self.memory, self.answer)


class Conversation:
    """
    Attributes:
        sample: its number.
        turns: so far.
        memories: what was in memory behind each chunk.
        answer: None until it is written.
    """

    def __init__(self, sample: int, asked: Asked, sizes: Sizes) -> None:
        self.sample, self.asked, self.sizes = sample, asked, sizes
        self.turns: list[Turn] = []
        self.memories: list[Tokens] = []
        self.answer: Written | None = None

    @property
    def answering(self) -> bool:
        """Whether there is nothing more to read."""
        return len(self.turns) >= len(self.asked.chunks)

    @property
    def most(self) -> int:
        """Tokens that are to be written now, at most."""
        return self.sizes.answer if self.answering else self.sizes.memory

    def prompt(self) -> Tokens:
        """What the model sees now."""
        asked = self.asked
        if not asked.chunks:
            return asked.prompt
        chunk = () if self.answering else asked.chunks[len(self.turns)]
        memory = self.memories[-1] if self.memories else ()
        return self.sizes.reading.filled(memory=memory, chunk=chunk, question=asked.prompt)

    def hear(self, written: Written) -> None:
        """The model wrote this behind :meth:`prompt`."""
        turn = Turn(self.sample, len(self.turns), (*self.prompt(), *written.tokens), written.own)
        if self.answering:
            self.answer = written
        else:
            self.memories.append(written.said)
        self.turns.append(turn)


def converse(conversations: Sequence[Conversation], pen: Pen, *seeds: int) -> list[Written]:
    """Goes on with conversations until each has its answer. What is drawn is of ``seeds``, the sample and the turn
    alone. Collective over the ranks that share the model."""
    while going := [one for one in conversations if one.answer is None]:
        for most in sorted({one.most for one in going}):
            now = [one for one in going if one.most == most]
            drawn = [seed_of(*seeds, one.sample, len(one.turns)) for one in now]
            for one, written in zip(now, pen.write([one.prompt() for one in now], drawn, most), strict=True):
                one.hear(written)
    return [one.answer for one in conversations if one.answer is not None]


def in_chunks(text: Tokens, size: int) -> tuple[Tokens, ...]:
    """Pieces of ``size`` tokens, the last one shorter."""
    return tuple(text[start : start + size] for start in range(0, len(text), size))
