"""Continuing texts with a trained model, token by token, from recurrent states and key/value caches."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.models.generation_state import GenerationState, chosen, side_by_side
from megaforge.parallel.context import ParallelContext

LARGEST_SEED = 2**63 - 1
PREFILL_CHUNK = 2048
ROOM = 1024  # places that caches have for new tokens from the beginning, at most


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens; 0: all.
        top_p: draw among the fewest most likely tokens whose probabilities reach this sum; 1: all (nucleus sampling,
            Holtzman et al., arXiv 1904.09751).
        seed: of the draws.
        min_p: draw among the tokens that have at least this share of the most likely one's probability (Nguyen et al.,
            arXiv 2407.01082); 0: all.
        repetition_penalty: divides positive and multiplies negative scores of tokens that the text already has, prompt
            included (Keskar et al., arXiv 1909.05858); 1: none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def validate(self, samples: int = 1) -> None:
        """Of ``samples`` texts, whose seeds follow each other.

        Raises:
            UserError: naming the flag, its value and its range.
        """
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: give a number from 0 on; 0 takes the most likely token")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must not be negative; 0 allows every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: give a share in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p {self.min_p}: give a share in [0, 1]; 0 allows every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition-penalty {self.repetition_penalty}: give a number above 0; 1 is none")
        most = LARGEST_SEED - samples + 1
        if not 0 <= self.seed <= most:
            raise UserError(f"--seed {self.seed}: give a number from 0 to {most}")


def token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p.

    Args:
        logits: [b, V].
        sampling: ``temperature`` must not be 0.

    Returns:
        fp64 [b, V]; each row sums to 1.
    """
    scores = logits.double()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / sampling.temperature  # never inf - inf, however cold
    if 0 < sampling.top_k < scores.shape[-1]:
        lowest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, float("-inf"))
    probabilities = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays when those before it do not yet reach top_p; the first always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= sampling.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``logits`` [b, V] with those of ``seen`` tokens, bool [b, V], made less likely
    (:attr:`Sampling.repetition_penalty`)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def refuse_unfinite(logits: Tensor) -> None:
    """
    Raises:
        UserError: the largest of some scores is not a number to go on with.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise UserError(
            "the model's scores are not finite numbers; its training diverged, or the checkpoint is damaged"
        )


def sample_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each sequence: [b, V] -> int64 [b], on the CPU. Draws on the CPU, alike on every machine."""
    logits = logits.cpu()
    refuse_unfinite(logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(token_probabilities(logits, sampling), 1, generator=generator).squeeze(1)


class Scorer(Protocol):
    """A model that texts are drawn from: :class:`megaforge.inference.staged.StagedModel`, or one that is being trained.

    Attributes:
        vocab_size: tokens that it has scores for.
    """

    vocab_size: int

    @property
    def ctx(self) -> ParallelContext: ...

    def new_state(self, expected: int = 0) -> GenerationState:
        """An empty memory, with room for so many tokens."""

    def logits(self, tokens: Tensor, state: GenerationState) -> Tensor | None:
        """Scores after the last of tokens int64 [b, s] that continue those of ``state``: [b, vocabulary], where the
        last stage is."""

    def tell(self, drawn: Tensor) -> None:
        """What was drawn where the last stage is, int64 [b], the ranks that share the model get, in place."""


class Continuations:
    """Several texts that go on together: draw, drop those that are done, draw again. All ranks do the same calls.

    Prompts are computed in pieces (those of one length together, as far as they fit), each further token of all of them
    in one step from the states. One rank that holds the last stage draws and tells the others, so that rounding can
    never let ranks go on with different tokens. A text depends on its own prompt and seed alone, not on its company.

    Attributes:
        going_on: the numbers of the texts that are not done.
        inserted: those of them whose newest token was given (:meth:`insert`), not drawn.
    """

    def __init__(
        self,
        model: Scorer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        unusable: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        max_new_tokens: int = 0,
    ) -> None:
        """Computes the prompts.

        Args:
            prompts: token ids, at least one each.
            seeds: of each text's draws; None: that of ``sampling`` for all.
            unusable: token ids that are never drawn.
            prefill_chunk: tokens of the prompts that are computed at once: memory for them does not grow with their
                length, but for the caches that they fill.
            max_new_tokens: how many will be drawn, as far as that is known; caches then need not grow.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary or bad sampling settings.
        """
        sampling.validate()
        check_prompts(prompts, model.vocab_size)
        self.model, self.sampling = model, sampling
        self.going_on = list(range(len(prompts)))
        self._unusable = torch.tensor(list(unusable), dtype=torch.long, device=model.ctx.device)
        seeds = [sampling.seed] * len(prompts) if seeds is None else seeds
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._drawn: Tensor | None = None
        self._given: dict[int, deque[int]] = {}
        self.inserted: frozenset[int] = frozenset()
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool)
            for seen, prompt in zip(self._seen, prompts, strict=True):
                seen[list(prompt)] = True
        longest = max(map(len, prompts), default=0)
        self._read_prompts(prompts, max(1, prefill_chunk), longest + min(max_new_tokens, ROOM))

    def _read_prompts(self, prompts: Sequence[Sequence[int]], chunk: int, expected: int) -> None:
        distinct = list(dict.fromkeys(map(tuple, prompts)))  # several samples of one prompt read it once
        by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for prompt in distinct:
            by_length[len(prompt)].append(prompt)
        states, scores = [], []
        for length, alike in by_length.items():
            # Where a prompt is cut depends on its length alone, and pieces are about equal: none has few tokens.
            pieces, together = -(-length // chunk), max(1, chunk // length)
            for first in range(0, len(alike), together):
                state = self.model.new_state(expected)
                tokens = torch.tensor(alike[first : first + together], device=self.model.ctx.device)
                for piece in tokens.tensor_split(pieces, 1):
                    scored = self.model.logits(piece, state)
                scores.append(scored)
                states.append(state)
        self._state = states[0] if len(states) == 1 else side_by_side(states)
        known = [some for some in scores if some is not None]
        self._logits = torch.cat(known) if known else None
        self._rows = len(distinct)
        rows = {prompt: row for row, prompt in enumerate(p for alike in by_length.values() for p in alike)}
        self._keep([rows[tuple(prompt)] for prompt in prompts])

    def _keep(self, rows: list[int]) -> None:
        """Goes on with these rows of the batch, in this order."""
        if rows != list(range(self._rows)):
            index = torch.tensor(rows, dtype=torch.long, device=self.model.ctx.device)
            self._state, self._rows = chosen(self._state, index), len(rows)
            self._logits = None if self._logits is None else self._logits.index_select(0, index)
            self._drawn = None if self._drawn is None else self._drawn.index_select(0, index)

    def draw(self) -> dict[int, int]:
        """The next token of each text that goes on, by its number."""
        if not self.going_on:
            return {}
        if self._drawn is not None:
            self._logits = self.model.logits(self._drawn.view(-1, 1), self._state)
        ctx = self.model.ctx
        if self._logits is None:
            self._drawn = torch.empty(self._rows, dtype=torch.long, device=ctx.device)
        else:
            self._drawn = self._sampled(self._logits).to(ctx.device)
        self.model.tell(self._drawn)
        self._put_given(self._drawn)
        drawn = dict(zip(self.going_on, self._drawn.tolist(), strict=True))
        if self._seen is not None:
            self._seen[list(drawn), list(drawn.values())] = True
        return drawn

    def insert(self, number: int, tokens: Sequence[int]) -> None:
        """Text ``number`` goes on with these tokens, whatever the model would draw; on all ranks alike.

        Raises:
            UserError: one is outside of the vocabulary.
        """
        if tokens:
            check_prompts([tokens], self.model.vocab_size)
            self._given.setdefault(number, deque()).extend(tokens)

    def _put_given(self, drawn: Tensor) -> None:
        """Puts what was given in place of what was drawn."""
        given = [(row, number) for row, number in enumerate(self.going_on) if self._given.get(number)]
        for row, number in given:
            drawn[row] = self._given[number].popleft()
        self.inserted = frozenset(number for _, number in given)

    def _sampled(self, logits: Tensor) -> Tensor:
        """The next token of each row of the batch: [b, V] -> int64 [b], on the CPU."""
        scores = logits.index_fill(-1, self._unusable, float("-inf")).cpu()
        if self._seen is not None:
            scores = penalized(scores, self._seen[self.going_on], self.sampling.repetition_penalty)
        rows = zip(scores.split(1), self.going_on, strict=True)
        return torch.cat([sample_token(row, self.sampling, self._generators[number]) for row, number in rows])

    def drop(self, numbers: Sequence[int]) -> None:
        """Ends these texts."""
        if numbers:
            rows = [row for row, number in enumerate(self.going_on) if number not in numbers]
            self.going_on = [self.going_on[row] for row in rows]
            if rows:
                self._keep(rows)


def unusable_ids(tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """Ids of a model's ``vocabulary`` that stand for nothing in ``tokenizer``: padding, holes, and what a larger model
    vocabulary has beyond it."""
    return [*(i for i in tokenizer.missing_ids() if i < vocabulary), *range(tokenizer.vocab_size, vocabulary)]


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """
    Raises:
        UserError: one is empty, or holds a token outside of the vocabulary.
    """
    for number, prompt in enumerate(prompts, 1):
        _check_prompt(prompt, number if len(prompts) > 1 else None, vocabulary)


def _check_prompt(prompt: Sequence[int], number: int | None, vocabulary: int) -> None:
    name = "--prompt" if number is None else f"prompt {number}"
    if not prompt:
        raise UserError(f"{name} is empty: the model needs at least one token to go on from")
    if max(prompt) >= vocabulary or min(prompt) < 0:
        raise UserError(f"{name} holds token {max(prompt)}, the model's vocabulary has {vocabulary}; use its tokenizer")
