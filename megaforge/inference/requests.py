"""Questions to a trained model, at any layout: how likely a text is after another, and how a text goes on.

What is asked is sorted by length, so that batches hold little padding, and answered from a cache where it was asked
before: an evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megaforge.data.loader import Batch
from megaforge.data.padding import pad_batch
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.inference.generation import Continuations, Sampling, unusable_ids
from megaforge.inference.restore import TrainedModel
from megaforge.inference.text_stream import TextStream
from megaforge.inference.tool_calls import Insertions, ToolCalls


@dataclass(frozen=True)
class Likelihood:
    """How likely ``continuation`` is after ``context``; at least one token each. Tokens that no sequence has room for
    go from the context's beginning."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Writing:
    """How a text goes on: greedily with a temperature of 0, until one of ``stops``, the end of a document, or
    ``max_new_tokens``."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0


Request = Likelihood | Writing


class Scored(NamedTuple):
    """The answer to a :class:`Likelihood`.

    Attributes:
        log_probability: of the whole continuation, in nats.
        greedy: whether each of its tokens was the likeliest one.
    """

    log_probability: float
    greedy: bool


Answer = Scored | str


@dataclass
class Cut:
    """What was longer than a sequence may be."""

    requests: int = 0
    tokens: int = 0

    def line(self, max_length: int) -> str:
        """What to say of it."""
        return (
            f"{self.requests} prompts are longer than {max_length} tokens (--max-length): the first of their tokens, "
            f"{self.tokens:,} in all, are left out"
        )


@dataclass
class Answerer:
    """Answers requests. All ranks make the same calls and get the same answers.

    Attributes:
        max_length: tokens that a sequence may have.
        batch_size: sequences computed at once.
        cut: what did not fit so far.
        tools: what answers the model while it writes.
    """

    trained: TrainedModel
    tokenizer: Tokenizer
    max_length: int
    batch_size: int = 8
    cut: Cut = field(default_factory=Cut)
    tools: ToolCalls | None = None

    def __post_init__(self) -> None:
        longest = self.trained.model.longest
        if longest is not None and self.max_length > longest:
            raise UserError(
                f"--max-length {self.max_length}: the model has positions for {longest} tokens "
                "(--max-position-embeddings); give it no more"
            )

    def answer(
        self, requests: Sequence[Request], told: Callable[[list[int], list[Answer]], None] | None = None
    ) -> list[Answer]:
        """The answer to each.

        Args:
            told: called with places and answers as soon as these are known.
        """
        answers: dict[int, Answer] = {}
        by_length = sorted(range(len(requests)), key=lambda place: (_kind(requests[place]), -_length(requests[place])))
        for _, alike in groupby(by_length, lambda place: _kind(requests[place])):
            places = list(alike)
            likelihoods = isinstance(requests[places[0]], Likelihood)
            step = self.batch_size * (self.trained.ctx.dp.size * self.trained.ctx.pp.size if likelihoods else 1)
            for start in range(0, len(places), step):
                now = places[start : start + step]
                found = self._found([requests[place] for place in now])
                answers.update(zip(now, found, strict=True))
                if told is not None:
                    told(now, found)
        return [answers[place] for place in range(len(requests))]

    def _found(self, asked: Sequence[Request]) -> list[Answer]:
        """Answers to requests of one kind."""
        scored = [one for one in asked if isinstance(one, Likelihood)]
        written = [one for one in asked if not isinstance(one, Likelihood)]
        assert not (scored and written), "a batch has requests of one kind"
        return self._score(scored) if scored else self._write(written)

    def _score(self, asked: Sequence[Likelihood]) -> list[Answer]:
        """One batch for each stage of each of the dp ranks, of the same shape on all of them."""
        ctx, rows = self.trained.ctx, -(-len(asked) // (self.trained.ctx.dp.size * self.trained.ctx.pp.size))
        sequences = [self._fitted(one) for one in asked]
        length = max(len(tokens) for tokens, _ in sequences)
        # Rows that nobody asked for: every stage of every replica has a batch to work on.
        empty = ([0] * 2, 0)
        sequences += [empty] * (rows * ctx.dp.size * ctx.pp.size - len(sequences))
        batches = [_batch(sequences[start : start + rows], length) for start in range(0, len(sequences), rows)]
        own = slice(ctx.dp.rank * ctx.pp.size, (ctx.dp.rank + 1) * ctx.pp.size)
        sums = torch.zeros(len(sequences), 2, dtype=torch.float64, device=ctx.device)
        sums[own.start * rows : own.stop * rows] = self.trained.model.sequence_sums(batches[own])
        for axis in (ctx.dp, ctx.pp):
            if axis.group is not None:
                dist.all_reduce(sums, group=axis.group)
        counts = [count for _, count in sequences]
        pairs = zip(sums.tolist(), counts, strict=True)
        found: list[Answer] = [Scored(-nats, round(correct) == count) for (nats, correct), count in pairs]
        return found[: len(asked)]

    def _fitted(self, asked: Likelihood) -> tuple[list[int], int]:
        """Its newest tokens, and how many at their end are scored."""
        whole = [*asked.context, *asked.continuation]
        kept = whole[-(self.max_length + 1) :]  # the last token is predicted, and never read
        self._count(len(whole) - len(kept))
        return kept, min(len(asked.continuation), len(kept) - 1)

    def _count(self, lost: int) -> None:
        if lost > 0:
            self.cut.requests += 1
            self.cut.tokens += lost

    def _write(self, asked: Sequence[Writing]) -> list[Answer]:
        model, prompts = self.trained.model, [self._prompt(one) for one in asked]
        streams = [TextStream(self.tokenizer, prompt, one.stops) for prompt, one in zip(prompts, asked, strict=True)]
        asking = None if self.tools is None else Insertions(self.tools)
        if (most := max(one.max_new_tokens for one in asked)) > 0:
            batch = Continuations(
                model,
                prompts,
                Sampling(temperature=asked[0].temperature),
                seeds=[one.seed for one in asked],
                unusable=unusable_ids(self.tokenizer, model.vocab_size),
                max_new_tokens=most,
            )
            for drawn in range(1, most + 1):
                new = batch.draw()
                ended = [n for n, token in new.items() if self._ends(asked[n], streams[n], token, drawn)]
                if asking is not None:
                    asking.answer(batch, {n: streams[n].text for n in new if n not in ended})
                batch.drop(ended)
        for stream in streams:
            stream.close()
        return [stream.text for stream in streams]

    def _ends(self, asked: Writing, stream: TextStream, token: int, drawn: int) -> bool:
        """Adds a token to its text; whether that was the last one."""
        if token == self.tokenizer.eod:
            return True
        stream.add(token)
        return stream.stopped is not None or drawn >= asked.max_new_tokens

    def _prompt(self, asked: Writing) -> list[int]:
        room = self.max_length - asked.max_new_tokens
        if room < 1:
            raise UserError(
                f"--max-length {self.max_length}: leaves no room for a prompt before {asked.max_new_tokens} new tokens "
                f"(max_new_tokens, max_gen_toks); give at least {asked.max_new_tokens + 1}, or fewer new tokens"
            )
        self._count(len(asked.prompt) - room)
        return list(asked.prompt[-room:])


def _kind(request: Request) -> tuple[str, float]:
    """Requests of one kind are answered side by side."""
    return ("likelihood", 0.0) if isinstance(request, Likelihood) else ("writing", request.temperature)


def _length(request: Request) -> int:
    """About how much work it is."""
    if isinstance(request, Likelihood):
        return len(request.context) + len(request.continuation)
    return len(request.prompt)


def _batch(sequences: Sequence[tuple[list[int], int]], length: int) -> Batch:
    """Sequences as rows, each of whose last so many tokens count."""
    tokens, _ = pad_batch([tokens for tokens, _ in sequences], length=length)
    counts = np.zeros((len(sequences), length - 1), np.float32)
    for row, (sequence, count) in enumerate(sequences):
        counts[row, len(sequence) - 1 - count : len(sequence) - 1] = 1
    starts = np.zeros(counts.shape, np.bool_)
    starts[:, 0] = True
    whole = torch.from_numpy(tokens)
    inputs, labels = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
    return Batch(inputs, labels, torch.from_numpy(counts), torch.from_numpy(starts))


def key_of(model: str, request: Request) -> str:
    """What a request to the model of this identity is called in a cache."""
    parts = [model, type(request).__name__, *vars(request).values()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
