"""What was written, as micro-batches that are learnt from: prompts and answers behind each other, and of every token
that was written what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.data.loader import Batch
from megaforge.parallel.agree import reduced
from megaforge.parallel.context import ParallelContext
from megaforge.reasoning.packing import Packed, Tokens, as_batch, pack, rounded

NUMBERS = ("old", "reference", "advantage", "weight")


class Turn(NamedTuple):
    """A prompt and what was written behind it, as a document.

    Attributes:
        sample: whose.
        number: which of its.
        tokens: of both.
        own: of each token behind the prompt, whether the model wrote it; the others are what a tool answered.
    """

    sample: int
    number: int
    tokens: Tokens
    own: tuple[bool, ...]

    @property
    def written(self) -> int:
        """Tokens behind the prompt."""
        return len(self.own)


@dataclass(frozen=True)
class Answer:
    """A sample's turns and what they are worth.

    Attributes:
        old, reference: of each turn, the log-probabilities of what was written, then and by the reference.
        advantage, weight: of every token that the model wrote.
        told: of the whole.
    """

    turns: Sequence[Turn]
    old: Sequence[Sequence[float]]
    reference: Sequence[Sequence[float]]
    advantage: float
    weight: float
    told: Mapping[str, float]

    def state(self) -> dict[str, Any]:
        """JSON."""
        return {name: getattr(self, name) for name in ("old", "reference", "advantage", "weight", "told")} | {
            "turns": [list(turn) for turn in self.turns]
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Answer:
        """The opposite."""
        turns = [Turn(sample, number, tuple(tokens), tuple(own)) for sample, number, tokens, own in state["turns"]]
        return cls(**{**state, "turns": turns})


def as_batches(
    micro_batches: Sequence[Sequence[Turn]], read: Sequence[Batch], length: int, ctx: ParallelContext
) -> list[Batch]:
    """Micro-batches of one shape [rows, length] on all ranks, of the turns of each, in place of those that were
    ``read``.

    ``extras``: bool ``written`` [rows, length], where the model wrote the next token.
    """
    packed = [_packed(turns, length) for turns in micro_batches]
    # What layers make of padding, such as a router's loss, must be the same whoever has which micro-batch.
    rows = rounded(reduced(ctx, max(one.rows for one in packed), dist.ReduceOp.MAX))
    batches = []
    for own, batch in zip(packed, read, strict=True):
        written = torch.zeros(rows, length, dtype=torch.bool)
        for turn, (row, first) in own.places.items():
            written[row, _span(turn, first)] = torch.tensor(turn.own)
        extras = {"written": written}
        batches.append(replace(as_batch(own, rows, length), samples=batch.samples, of=batch.of, extras=extras))
    return batches


def with_worth(batch: Batch, answers: Sequence[Answer]) -> Batch:
    """A micro-batch of the turns of these answers with what they are worth: :data:`NUMBERS` fp64 [rows, length], and
    sums of what is ``told`` of answers and how many they are, [rows, ...] in the first row."""
    shape = batch.tokens.shape
    numbers = torch.zeros(len(NUMBERS), *shape, dtype=torch.float64)
    places = _places(answers, shape[1])
    for one in answers:
        for turn, old, reference in zip(one.turns, one.old, one.reference, strict=True):
            row, first = places[turn]
            span = _span(turn, first)
            values = (old, reference, [one.advantage] * len(old), [one.weight] * len(old))
            numbers[:, row, span] = torch.tensor(values, dtype=torch.float64) * torch.tensor(turn.own)
    told = torch.zeros(shape[0], len(answers[0].told) + 1, dtype=torch.float64)
    told[0] = torch.tensor([[*one.told.values(), 1.0] for one in answers], dtype=torch.float64).sum(0)
    return replace(batch, extras={**batch.extras, **dict(zip(NUMBERS, numbers, strict=True)), "told": told})


def of_turns(found: Tensor, turns: Sequence[Turn]) -> list[list[float]]:
    """Numbers of the tokens of a micro-batch [rows, length], as those of what was written in each of its turns."""
    places = _packed(turns, found.shape[1]).places
    return [found[places[turn][0], _span(turn, places[turn][1])].tolist() for turn in turns]


def _packed(turns: Sequence[Turn], length: int) -> Packed[Turn]:
    return pack(turns, length, "a prompt and its answer have {} tokens", "prompt or --rl-max-new-tokens")


def _places(answers: Sequence[Answer], length: int) -> dict[Turn, tuple[int, int]]:
    return _packed([turn for one in answers for turn in one.turns], length).places


def _span(turn: Turn, first: int) -> slice:
    """The tokens whose successors were written."""
    end = first + len(turn.tokens) - 1
    return slice(end - turn.written, end)
