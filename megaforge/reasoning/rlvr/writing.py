"""Answers as a model draws them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megaforge.data.tokenizer import Tokenizer
from megaforge.inference.generation import Continuations, Sampling, Scorer, unusable_ids
from megaforge.inference.text_stream import TextStream
from megaforge.inference.tool_calls import Insertions, ToolCalls
from megaforge.reasoning.packing import Tokens


class Written(NamedTuple):
    """
    Attributes:
        tokens: with the one that ends them, if they do.
        ended: whether they do.
        own: of each, whether the model wrote it, and not a tool.
    """

    tokens: Tokens
    ended: bool
    own: tuple[bool, ...]

    @property
    def said(self) -> Tokens:
        """Without the end."""
        return self.tokens[:-1] if self.ended else self.tokens


@dataclass(frozen=True)
class Pen:
    """How a model writes.

    Attributes:
        temperature: 0 takes the most likely tokens.
        at_once: texts side by side.
        tools: what answers the model while it writes.
    """

    model: Scorer
    tokenizer: Tokenizer
    temperature: float
    at_once: int
    tools: ToolCalls | None = None

    def write(self, prompts: Sequence[Tokens], seeds: Sequence[int], most: int) -> list[Written]:
        """What the model writes behind each prompt, ``most`` tokens or fewer; each by its own seed, whatever is written
        beside it. Collective over the ranks that share the model."""
        found: list[Written] = []
        for start in range(0, len(prompts), self.at_once):
            stop = start + self.at_once
            found += self._write(prompts[start:stop], seeds[start:stop], most)
        return found

    def _write(self, prompts: Sequence[Tokens], seeds: Sequence[int], most: int) -> list[Written]:
        batch = Continuations(
            *(self.model, prompts, Sampling(self.temperature)),
            seeds=seeds,
            unusable=unusable_ids(self.tokenizer, self.model.vocab_size),
            max_new_tokens=most,
        )
        asking = None if self.tools is None else Insertions(self.tools)
        streams = [TextStream(self.tokenizer, list(prompt)) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        own: list[list[bool]] = [[] for _ in prompts]
        for _ in range(most):
            if not batch.going_on:
                break
            drawn = batch.draw()
            for number, token in drawn.items():
                tokens[number].append(token)
                own[number].append(number not in batch.inserted)
            batch.drop([number for number, token in drawn.items() if token == self.tokenizer.eod])
            if asking is not None:
                for number in batch.going_on:
                    streams[number].add(drawn[number])
                asking.answer(batch, {number: streams[number].text for number in batch.going_on})
        end = self.tokenizer.eod
        return [Written(tuple(text), text[-1] == end, tuple(ours)) for text, ours in zip(tokens, own, strict=True)]

    def text(self, written: Written) -> str:
        """Without its end."""
        return self.tokenizer.decode(list(written.said))


def seed_of(*parts: int) -> int:
    """A seed of draws, below 2^63: of these numbers alone."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "little") >> 1
