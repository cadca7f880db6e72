"""One text, continued alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megaforge.inference.generation import Continuations, Sampling
from megaforge.inference.staged import StagedModel


def generate(
    model: StagedModel, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop_token: int | None = None
) -> Iterator[int]:
    """Yields the tokens that follow ``prompt``, as they are drawn, up to ``stop_token``."""
    text = Continuations(model, [prompt], sampling)
    for _ in range(max_new_tokens):
        token = text.draw()[0]
        if token == stop_token:
            return
        yield token
