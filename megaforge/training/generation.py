"""Continuing a text with a trained model, token by token, from its recurrent state and key/value caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens; 0: all.
        top_p: draw among the fewest most likely tokens whose probabilities reach this sum; 1: all (nucleus sampling,
            Holtzman et al., arXiv 1904.09751).
        seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def validate(self) -> None:
        """Raises:
        UserError: naming the flag, its value and its range.
        """
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: must not be negative; 0 takes the most likely token")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must not be negative; 0 allows every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: give a share in (0, 1]")


def token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, top-k and top-p.

    Args:
        logits: [b, V].
        sampling: ``temperature`` must not be 0.

    Returns:
        fp64 [b, V]; each row sums to 1.
    """
    scores = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        lowest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, float("-inf"))
    probabilities = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays when those before it do not yet reach top_p; the first always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= sampling.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def sample_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each sequence: [b, V] -> int64 [b], on the CPU. Draws on the CPU, alike on every machine."""
    logits = logits.cpu()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(token_probabilities(logits, sampling), 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: HybridModel, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop_token: int | None = None
) -> Iterator[int]:
    """Yields the tokens that follow ``prompt``, as they are drawn. Collective: every rank must use it up alike.

    The prompt is computed in one pass, each further token in one step from the state. Rank 0 draws and tells the
    others, so that rounding can never let ranks go on with different tokens.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: how many at most.
        stop_token: ends the text and is not yielded.

    Raises:
        UserError: an empty prompt, a token outside the vocabulary or bad sampling settings.
    """
    sampling.validate()
    vocabulary = model.head.vocab_size
    if not prompt:
        raise UserError("--prompt '': the model needs at least one token to go on from")
    if max(prompt) >= vocabulary or min(prompt) < 0:
        raise UserError(
            f"--prompt holds token {max(prompt)}, the model's vocabulary has {vocabulary}; use its tokenizer"
        )
    device = model.ctx.device
    generator = torch.Generator().manual_seed(sampling.seed)
    state = model.new_state()
    tokens = torch.tensor([list(prompt)], dtype=torch.long, device=device)
    for _ in range(max_new_tokens):
        logits = model.logits(tokens, state=state, last_only=True)[:, -1]
        drawn = sample_token(logits, sampling, generator).to(device)
        if model.ctx.world.size > 1:
            dist.broadcast(drawn, src=0, group=model.ctx.world.group)
        token = int(drawn[0])
        if token == stop_token:
            return
        yield token
        tokens = drawn.view(1, 1)
