"""What an agent may do; each action is in :data:`megaforge.registry.AGENT_ACTIONS`, in the order of the policy's
outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaforge.reasoning.agent.episode import Episode, Seen


@dataclass(frozen=True)
class AgentAction:
    """
    Attributes:
        act: does it, to an episode whose present context the model has seen.
        free: whether it costs nothing.
        answering: whether it may be chosen behind the last chunk, too.
    """

    act: Callable[[Episode, Seen], None]
    free: bool = False
    answering: bool = False


def _summarize(episode: Episode, seen: Seen) -> None:
    """The chunk's summaries join working memory."""
    episode.memory.summarize(seen.summaries)


def _cache_write(episode: Episode, seen: Seen) -> None:
    """The chunk joins the episodic index, by what the model made of it beside the question."""
    episode.memory.write(seen.key, episode.chunks[episode.place])


def _retrieve(episode: Episode, seen: Seen) -> None:
    """Chunks are staged, first those beside which the model made most else of the question than of what it sees now:
    where it does not know the answer, those nearest to that would be the ones that do not tell it either."""
    episode.memory.retrieve(-seen.key, episode.setting.top_k)


def _splice_window(episode: Episode, seen: Seen) -> None:
    """What is staged comes into the window, as far as it has room."""
    episode.window += episode.memory.splice(episode.setting.window - len(episode.window))


SUMMARIZE = AgentAction(_summarize, free=True)
CACHE_WRITE = AgentAction(_cache_write)
RETRIEVE = AgentAction(_retrieve, answering=True)
SPLICE_WINDOW = AgentAction(_splice_window, answering=True)
