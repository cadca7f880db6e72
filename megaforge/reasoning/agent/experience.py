"""What was played, as micro-batches that are learnt from: the contexts of all decisions, each once, and of every
decision where it was made and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.data.loader import Batch
from megaforge.parallel.agree import reduced
from megaforge.parallel.context import ParallelContext
from megaforge.reasoning.agent.episode import Context, Decision, pack_contexts
from megaforge.reasoning.packing import as_batch, rounded, stacked

NUMBERS = ("old", "reference", "value", "advantage", "returns", "weight")
TOLD = (
    *("reward", "accuracy", "actions", "decisions_made", "memory_summaries", "memory_entries"),
    *("redrawn", "equal_groups"),
)


@dataclass(frozen=True)
class Record:
    """An episode that was played.

    Attributes:
        numbers: of each decision, by :data:`NUMBERS`.
        told: of the whole, by :data:`TOLD`.
    """

    decisions: Sequence[Decision]
    numbers: Mapping[str, Sequence[float]]
    told: Mapping[str, float]

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
        return {"decisions": decisions, "numbers": numbers, "told": dict(self.told)}

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


def as_batches(
    micro_batches: Sequence[Sequence[Sequence[Decision]]], read: Sequence[Batch], length: int, ctx: ParallelContext
) -> list[Batch]:
    """Micro-batches of one shape on all ranks, of the decisions of each one's episodes, in place of those that were
    ``read``.

    ``extras``: of decisions made in a row [rows, n]: ``place`` of its token, from 1 on (0: no decision), ``action``,
    ``flags`` [rows, n, F], ``memory`` [rows, n, S], ``episode`` and ``number``: whose it is and which, ``ends`` whether
    it is the last; and of tokens [rows, length] whether they are a ``chunk``'s.
    """
    packed = [pack_contexts((d.context for one in episodes for d in one), length) for episodes in micro_batches]
    # What layers make of padding, such as a router's loss, must be the same whoever has which micro-batch.
    rows = rounded(reduced(ctx, max(one.rows for one in packed), dist.ReduceOp.MAX))
    dealt: list[list[list[_Made]]] = []
    for own, episodes in zip(packed, micro_batches, strict=True):
        dealt.append([[] for _ in range(rows)])
        for episode, decisions in enumerate(episodes):
            for number, decision in enumerate(decisions):
                row, first = own.places[decision.context]
                last = number + 1 == len(decisions)
                dealt[-1][row].append(_Made(first + decision.context.last, decision, episode, number, last))
    most = max(len(row) for one in dealt for row in one)
    batches = []
    for own, each, batch in zip(packed, dealt, read, strict=True):
        made = as_batch(own, rows, length)
        extras = _extras(each, most) | {"chunk": _chunks(own.places, made)}
        batches.append(replace(made, samples=batch.samples, of=batch.of, extras=extras))
    return batches


def with_worth(batch: Batch, records: Sequence[Record]) -> Batch:
    """A micro-batch of :func:`as_batches`, and in its ``extras`` what the decisions of its episodes' ``records`` are
    worth: :data:`NUMBERS` [rows, n], and ``told`` [rows, n, K] of an episode's last one."""
    there, ends = batch.extras["place"] > 0, batch.extras["ends"]
    first = torch.tensor(list(accumulate((len(one.decisions) for one in records), initial=0)))
    at = first[batch.extras["episode"][there]] + batch.extras["number"][there]
    extras = {}
    for name in NUMBERS:
        flat = torch.tensor([x for one in records for x in one.numbers[name]], dtype=torch.float64)
        extras[name] = torch.zeros(there.shape, dtype=torch.float64)
        extras[name][there] = flat[at]
    whole = torch.tensor([[one.told[name] for name in TOLD] for one in records], dtype=torch.float64)
    extras["told"] = torch.zeros(*there.shape, len(TOLD), dtype=torch.float64)
    extras["told"][ends] = whole[batch.extras["episode"][ends]]
    return replace(batch, extras={**batch.extras, **extras})


def _chunks(places: Mapping[Context, tuple[int, int]], batch: Batch) -> Tensor:
    found = torch.zeros_like(batch.document_start)
    for context, (row, first) in places.items():
        begin, end = context.chunk
        found[row, first + begin : first + end] = True
    return found


class _Made(NamedTuple):
    """A decision: the place of its token in a row, whose it is, which of that episode's, and whether it is the last."""

    place: int
    decision: Decision
    episode: int
    number: int
    last: bool


def _extras(rows: Sequence[Sequence[_Made]], most: int) -> dict[str, Tensor]:
    some = next(one.decision for row in rows for one in row)
    shape = (len(rows), most)
    place, action, episode, number = torch.zeros(4, *shape, dtype=torch.long).unbind()
    flags, ends = torch.zeros(*shape, len(some.flags)), torch.zeros(shape, dtype=torch.bool)
    for row, own in enumerate(rows):
        if not own:
            continue
        count = len(own)
        place[row, :count] = torch.tensor([1 + one.place for one in own])
        action[row, :count] = torch.tensor([one.decision.action for one in own])
        episode[row, :count] = torch.tensor([one.episode for one in own])
        number[row, :count] = torch.tensor([one.number for one in own])
        ends[row, :count] = torch.tensor([one.last for one in own])
        flags[row, :count] = torch.tensor([one.decision.flags for one in own])
    memory = stacked([[one.decision.memory for one in own] for own in rows], most, some.memory)
    whose = {"episode": episode, "number": number, "ends": ends}
    return {"place": place, "action": action, "flags": flags, "memory": memory, **whose}
