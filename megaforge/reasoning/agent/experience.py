"""What was played, as micro-batches that are learnt from: the contexts of all decisions, each once, and of every
decision where it was made and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.data.loader import Batch
from megaforge.reasoning.agent.episode import Context, Decision
from megaforge.reasoning.agent.packing import as_batch, pack, rounded, stacked

NUMBERS = ("old", "reference", "value", "advantage", "returns", "weight")
TOLD = ("reward", "accuracy", "actions", "decisions_made", "memory_summaries", "memory_entries")


@dataclass(frozen=True)
class Record:
    """An episode that was played.

    Attributes:
        numbers: of each decision, by :data:`NUMBERS`.
        told: of the whole, by :data:`TOLD`.
    """

    decisions: Sequence[Decision]
    numbers: Mapping[str, Sequence[float]]
    told: Sequence[float]

    def state(self) -> dict[str, Any]:
        """JSON."""
        decisions = [
            [
                list(one.context.tokens),
                *one.context.chunk,
                one.context.last,
                list(one.flags),
                one.memory.tolist(),
                one.action,
            ]
            for one in self.decisions
        ]
        numbers = {name: list(values) for name, values in self.numbers.items()}
        return {"decisions": decisions, "numbers": numbers, "told": list(self.told)}

    @classmethod
    def of(cls, state: Mapping[str, Any], dtype: torch.dtype) -> Record:
        """The opposite; ``dtype`` is that of what was read of memory."""
        decisions = [
            Decision(
                Context(tuple(tokens), (begin, end), last), tuple(flags), torch.tensor(memory, dtype=dtype), action
            )
            for tokens, begin, end, last, flags, memory, action in state["decisions"]
        ]
        return cls(decisions, state["numbers"], state["told"])


def as_batches(micro_batches: Sequence[Sequence[Record]], read: Sequence[Batch], length: int) -> list[Batch]:
    """Micro-batches of one shape, of the episodes of each, in place of those that were ``read``.

    ``extras``: of decisions made in a row [rows, n]: ``place`` of its token (-1: no decision), ``action``, ``flags``
    [rows, n, F], ``memory`` [rows, n, S], :data:`NUMBERS`, ``episode`` and ``number``: whose it is and which, ``ends``
    whether it is the last, ``told`` then [rows, n, K]; and of tokens [rows, length] whether they are a ``chunk``'s.
    """
    packed = [pack((d.context for one in records for d in one.decisions), length) for records in micro_batches]
    rows = rounded(max(one.rows for one in packed))
    dealt: list[list[list[_Made]]] = []
    for own, records in zip(packed, micro_batches, strict=True):
        dealt.append([[] for _ in range(rows)])
        for episode, record in enumerate(records):
            for number, decision in enumerate(record.decisions):
                row, first = own.places[decision.context]
                dealt[-1][row].append(_Made(first + decision.context.last, decision, record, episode, number))
    most = max(len(row) for one in dealt for row in one)
    batches = []
    for own, each, batch in zip(packed, dealt, read, strict=True):
        made = as_batch(own, rows, length)
        extras = _extras(each, most) | {"chunk": _chunks(own.places, made)}
        batches.append(replace(made, samples=batch.samples, of=batch.of, extras=extras))
    return batches


def _chunks(places: Mapping[Context, tuple[int, int]], batch: Batch) -> Tensor:
    found = torch.zeros_like(batch.document_start)
    for context, (row, first) in places.items():
        begin, end = context.chunk
        found[row, first + begin : first + end] = True
    return found


class _Made(NamedTuple):
    """A decision: the place of its token in a row, whose it is, and which of that episode's."""

    place: int
    decision: Decision
    record: Record
    episode: int
    number: int


def _extras(rows: Sequence[Sequence[_Made]], most: int) -> dict[str, Tensor]:
    some = next(one.decision for row in rows for one in row)
    shape = (len(rows), most)
    place, action, episode, number = torch.zeros(4, *shape, dtype=torch.long).unbind()
    place.fill_(-1)
    numbers = {name: torch.zeros(shape, dtype=torch.float64) for name in NUMBERS}
    flags, ends = torch.zeros(*shape, len(some.flags)), torch.zeros(shape, dtype=torch.bool)
    told = torch.zeros(*shape, len(TOLD), dtype=torch.float64)
    for row, own in enumerate(rows):
        if not own:
            continue
        count = len(own)
        place[row, :count] = torch.tensor([one.place for one in own])
        action[row, :count] = torch.tensor([one.decision.action for one in own])
        episode[row, :count] = torch.tensor([one.episode for one in own])
        number[row, :count] = torch.tensor([one.number for one in own])
        flags[row, :count] = torch.tensor([one.decision.flags for one in own])
        for name in own[0].record.numbers:
            values = [one.record.numbers[name][one.number] for one in own]
            numbers[name][row, :count] = torch.tensor(values, dtype=torch.float64)
        for column, one in enumerate(own):
            if one.number + 1 == len(one.record.decisions):
                ends[row, column] = True
                told[row, column] = torch.tensor(one.record.told, dtype=torch.float64)
    memory = stacked([[one.decision.memory for one in own] for own in rows], most, some.memory)
    whose = {"episode": episode, "number": number, "ends": ends, "told": told}
    return {"place": place, "action": action, "flags": flags, "memory": memory, **whose, **numbers}
