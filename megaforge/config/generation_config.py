"""Flags of what a model writes while it is trained."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class GenerationConfig:
    """Texts that the model writes at each evaluation (docs/generation.md)."""

    generate_prompts: tuple[str, ...] = flag(
        (),
        "at each evaluation, texts that the model continues by the likeliest tokens: printed, and kept in --save as "
        "samples.jsonl",
        metavar="TEXT",
    )
    generate_tokens: int = flag(32, "with --generate-prompts: tokens of each, at most", least=1, most=1 << 16)

    def validate(self) -> None:
        """
        Raises:
            UserError: a prompt stands there twice.
        """
        given = self.generate_prompts
        if twice := [text for text in given if given.count(text) > 1]:
            raise UserError(f"--generate-prompts {twice[0]!r}: stands there twice; leave one out")
