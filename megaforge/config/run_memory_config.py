"""Flags of what an agent's episodes leave behind for later ones."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class RunMemoryConfig:
    """A run's own memory of what its episodes wrote (--agent-memory run)."""

    agent_memory: str = flag(
        "episode",
        "episode: each begins with an empty memory; run: it also looks up what accepted episodes before it wrote",
        choices=("episode", "run"),
    )
    agent_accept_threshold: float = flag(
        0.0,
        "with --agent-memory run: least reward above its group's mean of an episode that is accepted",
        least=-2,
    )
    agent_memory_capacity: int = flag(
        1024, "with --agent-memory run: chunks that the run's memory holds", least=1, most=1 << 30
    )
    agent_memory_archive: str | None = flag(
        None, "with --agent-memory run: FILE to which what that memory gives up is appended", metavar="FILE"
    )

    @property
    def kept(self) -> bool:
        """Whether the run has a memory."""
        return self.agent_memory == "run"

    def validate(self) -> None:
        """
        Raises:
            UserError: the archive has no name.
        """
        if self.agent_memory_archive == "":
            raise UserError("--agent-memory-archive '': give the name of a file, such as runs/agent/archive.jsonl")
