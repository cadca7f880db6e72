"""How large the episodes of ``--objective agent`` are, as far as a configuration tells it."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.config import Config
from megaforge.data.task_source import task_of
from megaforge.reasoning.packing import rounded
from megaforge.reasoning.texts_beside import most_texts
from megaforge.tasks.chunked import make_chunked


@dataclass(frozen=True)
class Episodes:
    """Sizes of the episodes of a run, in tokens, of which a word of the task is one.

    Attributes:
        chunks: that an episode reads.
        decisions: at most.
        shortest, longest: a context with an empty window, and with a full one.
        changes: how often the window grows, at most: each time by a chunk or more.
        strides: summaries of a chunk.
        memory_dim: size of a summary.
        group: episodes of one example.
        tries: how often a group is played, at most (``--rl-resample``).
        group_texts: texts that are learnt beside each group (``--rl-ce-weight``).
    """

    chunks: int
    decisions: int
    shortest: int
    longest: int
    changes: int
    strides: int
    memory_dim: int
    group: int
    tries: int = 1
    group_texts: int = 0

    def rows(self, episodes: int, length: int) -> int:
        """Of ``length`` tokens, that the contexts of so many episodes fill at most, and those of the texts beside them:
        what a step learns from."""
        return rounded(self._rows(episodes * self.decisions, self.longest, length)) + self.texts(episodes)

    def texts(self, episodes: int) -> int:
        """Beside so many episodes, at most."""
        return most_texts(episodes, self.group, self.group_texts)

    def looked_at(self, episodes: int, length: int, *, most: bool) -> int:
        """Rows that are looked at at once, at least and at most, before anything is decided."""
        if most:
            return self._rows(episodes * (self.chunks + 1), self.longest, length)
        return self._rows(-(-episodes // self.group) * (self.chunks + 1), self.shortest, length)

    def vectors(self, episodes: int, length: int) -> int:
        """That are taken from what is looked at, at most: of each context its last token's and its chunk's summaries,
        and one of each row."""
        contexts = episodes * (self.chunks + 1)
        return contexts * (1 + self.strides) + self.looked_at(episodes, length, most=True)

    @staticmethod
    def _rows(contexts: int, size: int, length: int) -> int:
        return -(-contexts // max(1, length // size))


def episodes_of(config: Config) -> Episodes | None:
    """Those of a run; None: it plays none.

    Raises:
        UserError: the task has no example of this size.
    """
    name = task_of(config.data)
    if config.training.objective != "agent" or name is None:
        return None
    flags, chunk = config.rl, config.tasks.task_chunk_tokens
    example = make_chunked(name, config.training.seed, 0, flags.agent_chunks, chunk)
    question, answer = len(example.question.split()), len(example.answers)
    decisions = flags.agent_chunks + flags.agent_answer_steps
    changes = min(decisions // 2, flags.agent_window // chunk)
    window = min(flags.agent_window, changes * flags.memory_top_k * chunk)
    beside = question + max(chunk, answer)
    return Episodes(
        chunks=flags.agent_chunks,
        decisions=decisions,
        shortest=beside,
        longest=window + beside,
        changes=changes,
        strides=-(-chunk // config.model.memory_stride),
        memory_dim=config.model.memory_dim,
        group=flags.rl_group_size,
        tries=1 + flags.rl_resample,
        group_texts=flags.rl_ce_samples if flags.rl_ce_weight else 0,
    )
