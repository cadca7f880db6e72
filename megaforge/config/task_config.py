"""Flags of tasks whose text comes chunk by chunk: ``--data-path tasks://NAME``."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class TaskConfig:
    """Tasks in chunks (--data-path tasks://NAME)."""

    task_chunk_tokens: int = flag(16, "with tasks://: words of a chunk", least=2, most=1 << 20)
    task_window: int = flag(48, "with tasks://: words of chunks that a sample shows, at most", least=2, most=1 << 24)
    task_questions: int = flag(8, "with tasks://: questions of a sample's text, at most", least=1, most=1 << 16)

    def validate(self) -> None:
        """
        Raises:
            UserError: no chunk fits the window.
        """
        if self.task_window < self.task_chunk_tokens:
            raise UserError(
                f"--task-window {self.task_window} has no room for a chunk of --task-chunk-tokens "
                f"{self.task_chunk_tokens}; give at least {self.task_chunk_tokens}"
            )
