"""Flags of instruction data: ``--data-path chat://FILE.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class ChatConfig:
    """Conversations to learn answers from (--data-path chat://FILE.jsonl)."""

    chat_template: str | None = flag(
        None,
        "with chat://: the template of messages, Jinja or a tokenizer_config.json (default: the tokenizer's own)",
        metavar="FILE",
    )
    train_on_prompts: bool = flag(False, "with chat://: prompts count in the loss too, not answers alone")

    def validate(self) -> None:
        """Files are looked at when data are opened."""
