"""Greedy continuation several tokens at a time: the model's further predictions propose tokens, and one pass of the
model over all of them says which are its own (Leviathan et al., arXiv 2211.17192, at temperature 0; heads of the model
itself: Gloeckle et al., arXiv 2404.19737, section 3.2).

What is written is what the model itself takes as the most likely token at every place, whatever was proposed: a text is
the one that token after token would give, up to the rounding of sums over several tokens at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.inference.generation import PREFILL_CHUNK, check_prompts, refuse_unfinite
from megaforge.inference.staged import StagedModel
from megaforge.models.ahead import Ends

# Tokens that a recurrent state is behind by, at most: they are fed again with the next drafts, until it takes them in.
BACKLOG = 8


@dataclass
class Acceptance:
    """How well drafts were.

    Attributes:
        passes: of the model, over drafts.
        proposed, kept: of each further prediction, drafts and those that were the model's own token.
    """

    passes: int = 0
    proposed: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def count(self, proposed: int, kept: int) -> None:
        """Takes down a pass over ``proposed`` drafts, of which the first ``kept`` were right."""
        self.passes += 1
        self.proposed += [0] * (proposed - len(self.proposed))
        self.kept += [0] * (proposed - len(self.kept))
        for place in range(proposed):
            self.proposed[place] += 1
            self.kept[place] += place < kept

    def line(self, tokens: int, seconds: float) -> str:
        """For people: what was accepted, and how fast ``tokens`` came in ``seconds``."""
        if not self.passes:
            return "--speculate mtp: nothing was proposed"
        shares = ", ".join(f"{kept / max(all_, 1):.0%}" for kept, all_ in zip(self.kept, self.proposed, strict=True))
        each = 1 + sum(self.kept) / self.passes
        rate = f"; {tokens / seconds:.1f} tokens a second behind the first" if tokens and seconds else ""
        return (
            f"--speculate mtp: {sum(self.kept)} of {sum(self.proposed)} drafts accepted in {self.passes} passes "
            f"({shares} of the drafts one, two ... tokens on): {each:.2f} tokens a pass{rate}"
        )


class SpeculativeContinuations:
    """The calls of :class:`megaforge.inference.generation.Continuations`, at temperature 0; each text by itself. All
    ranks do the same calls.
    """

    def __init__(
        self,
        model: StagedModel,
        prompts: Sequence[Sequence[int]],
        *,
        unusable: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        max_new_tokens: int = 0,
        acceptance: Acceptance | None = None,
    ) -> None:
        """As :class:`megaforge.inference.generation.Continuations`; ``acceptance`` takes down how good drafts were.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, or a model that predicts the next token alone.
        """
        check_prompts(prompts, model.vocab_size)
        self.model = model
        self.going_on = list(range(len(prompts)))
        self.acceptance = acceptance or Acceptance()
        self.unusable = torch.tensor(list(unusable), dtype=torch.long, device=model.ctx.device)
        self._texts = [_Text(self, prompt, max(1, prefill_chunk), max_new_tokens) for prompt in prompts]

    def draw(self) -> dict[int, int]:
        """The next token of each text that goes on, by its number."""
        return {number: self._texts[number].next() for number in self.going_on}

    def drop(self, numbers: Sequence[int]) -> None:
        """Ends these texts."""
        self.going_on = [number for number in self.going_on if number not in numbers]
        for number in numbers:
            self._texts[number].end()

    def told(self, tokens: list[int], size: int) -> list[int]:
        """``size`` tokens as the rank that draws has them."""
        ctx = self.model.ctx
        if ctx.world.size == 1:
            return tokens
        sent = torch.zeros(size, dtype=torch.long, device=ctx.device)
        if ctx.world.rank == self.model.source:
            sent.copy_(torch.tensor(tokens))
        dist.broadcast(sent, src=self.model.source, group=ctx.world.group)
        heard: list[int] = sent.tolist()
        return heard


class _Text:
    """One text: tokens that are the model's, and how many of them its state has taken in."""

    def __init__(self, owner: SpeculativeContinuations, prompt: Sequence[int], chunk: int, expected: int) -> None:
        model = owner.model
        self._owner, self._model = owner, model
        self._drafts, self._state = model.drafts(), model.new_state(len(prompt) + expected)
        self._tokens, self._seen = list(prompt), 0  # tokens that drafts have taken in
        tokens = torch.tensor([list(prompt)], device=model.ctx.device)
        for piece in tokens.tensor_split(-(-len(prompt) // chunk), 1):
            first = self._state.length
            ends = model.ends(piece, self._state)
            if self._state.length == len(prompt):
                self._tokens += owner.told(self._best(ends, slice(-1, None)), 1)
            self._take(ends, first, self._tokens[: self._state.length + 1])
        self._taken = self._state.length
        self._ready = deque(self._tokens[-1:])

    def next(self) -> int:
        """The next token."""
        while not self._ready:
            self._step()
        return self._ready.popleft()

    def end(self) -> None:
        """Frees what the text remembers."""
        self._ready.clear()
        self._drafts, self._state = None, self._model.new_state()

    def _step(self) -> None:
        owner, behind = self._owner, len(self._tokens) - self._taken
        drafts = [] if behind > BACKLOG else self._propose()
        fed, back = [*self._tokens[self._taken :], *drafts], self._state.mark()
        ends = self._model.ends(torch.tensor([fed], device=self._model.ctx.device), self._state)
        own = owner.told(self._best(ends, slice(behind - 1, None)), 1 + len(drafts))  # the model's, after each of them
        kept = 0
        while kept < len(drafts) and drafts[kept] == own[kept]:
            kept += 1
        self._tokens += own[: kept + 1]
        self._ready.extend(own[: kept + 1])
        first, right = self._taken, behind + kept
        if kept == len(drafts) or self._state.can_shorten:
            self._taken += right
            if kept < len(drafts):
                self._state.shorten(self._taken)
        else:
            back()
        self._take(ends, first, self._tokens[: first + right + 1])
        if drafts:
            owner.acceptance.count(len(drafts), kept)

    def _propose(self) -> list[int]:
        """Drafts that still have a position."""
        count = self._owner.model.predictions
        if self._model.longest is not None:
            count = max(0, min(count, self._model.longest - len(self._tokens)))
        made = [] if self._drafts is None or not count else self._drafts.propose(self._tokens)[:count]
        return self._owner.told(made, count) if count else []

    def _take(self, ends: Ends | None, first: int, tokens: list[int]) -> None:
        """Shows drafts what of ``ends``, whose first token is number ``first``, they have not seen of all but the last
        of ``tokens``."""
        if self._drafts is not None and ends is not None:
            self._drafts.take(ends.rows(slice(self._seen - first, len(tokens) - 1 - first)), tokens)
        self._seen = len(tokens) - 1

    def _best(self, ends: Ends | None, rows: slice) -> list[int]:
        """The likeliest token after each of these rows; nothing on ranks without the last stage."""
        if ends is None:
            return []
        logits = ends.head.logits(ends.rows(rows).hidden)[0]
        refuse_unfinite(logits)
        best: list[int] = _masked(logits, self._owner.unusable).argmax(-1).tolist()
        return best


def _masked(logits: Tensor, unusable: Tensor) -> Tensor:
    return logits.index_fill(-1, unusable, float("-inf"))
