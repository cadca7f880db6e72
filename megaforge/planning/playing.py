"""What ``--objective agent`` takes beside its steps: episodes are played, and their decisions scored by the policy and
by its reference, in passes of the trained model without gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.config.config import Config
from megaforge.planning.costs import neediest_layer
from megaforge.planning.episodes import Episodes, episodes_of
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.round_time import forward_seconds
from megaforge.planning.rounds import Rounds
from megaforge.planning.stages import ModelParts, StagePart
from megaforge.planning.time import stage_times
from megaforge.reasoning.memory.episodic import most_bytes


@dataclass(frozen=True)
class Playing(Rounds):
    """Rounds of episodes.

    Attributes:
        kept_chunks: that the run's own memory holds at most (``--agent-memory run``); 0: it has none.
        chunk: tokens of one.
    """

    doing, without = "playing", "the reference in the same pass"
    episodes: Episodes
    epochs: int
    has_reference: bool
    kept_chunks: int = 0
    chunk: int = 0

    def rows(self, samples: int, length: int) -> int:
        return self.episodes.rows(samples, length)

    def step_bytes(self, parts: ModelParts, layout: PlannedLayout) -> float:
        """Whole hidden vectors, those that the summariser takes means of, and their gradient."""
        return 3.0 * layout.tokens * parts.cfg.hidden_size * layout.wide_size

    def device_bytes(self, parts: ModelParts, layout: PlannedLayout, own: Sequence[StagePart]) -> float:
        """As the last stage's rank needs it."""
        plain = dataclasses.replace(layout.unsplit, rounds=None, recompute="none", offload=False, compress=False)
        hidden = 2 * plain.tokens * parts.cfg.hidden_size * layout.wide_size  # whole vectors, and weighted
        return 2 * self._seen(parts, layout) + max(hidden, neediest_layer(parts, plain))

    def _vectors(self, layout: PlannedLayout) -> int:
        return self.episodes.vectors(layout.global_batch_size // layout.dp, layout.sequence_length)

    def _seen(self, parts: ModelParts, layout: PlannedLayout) -> float:
        return self._vectors(layout) * (parts.cfg.hidden_size + 1) * layout.wide_size

    def host_bytes(self, parts: ModelParts, layout: PlannedLayout) -> dict[str, float]:
        dim = self.episodes.memory_dim
        each = self._seen(parts, layout) + self._vectors(layout) * dim * layout.wide_size
        found = {"what was seen": (self.episodes.changes + 1) * each}
        if self.kept_chunks:
            found["the run's memory"] = float(most_bytes(dim, self.kept_chunks, self.chunk))
        return found

    def seconds(
        self, parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], gpu: Gpu, efficiency: Efficiency
    ) -> tuple[float, float]:
        """No window ever grows, or each as often as it can, and all is drawn again as often as it may be."""
        own, length = layout.global_batch_size // layout.dp, layout.sequence_length
        seen = dataclasses.replace(layout, rounds=None)  # rows of at most a micro-batch
        times = stage_times(parts, seen, stages, gpu, efficiency)
        rows = [self.episodes.looked_at(own, length, most=most) for most in (False, True)]
        least, most = (forward_seconds(layout, times, -(-count // layout.micro_batch_size)) for count in rows)
        return least, self._looks * most

    @property
    def _looks(self) -> int:
        return self.episodes.tries * (self.episodes.changes + 1)

    def described(self, layout: PlannedLayout) -> str:
        episodes = self.episodes
        texts = f", {more} of them texts beside them" if (more := episodes.texts(layout.micro_batch_size)) else ""
        return (
            f"episodes of {episodes.chunks} chunks: at most {episodes.decisions} decisions, each of a context of "
            f"{episodes.shortest} to {episodes.longest} tokens (a word of the task is one); a micro-batch of "
            f"{layout.micro_batch_size} is {layout.rows} rows of {layout.sequence_length} at most{texts}"
        )

    def between(self) -> str:
        return f"1 to {self._looks} looks at all that is to be read"


def playing_of(config: Config) -> Playing | None:
    """The rounds of ``--objective agent``; None: the run plays none.

    Raises:
        UserError: the task has no example of this size.
    """
    if (episodes := episodes_of(config)) is None:
        return None
    flags = config.run_memory
    kept = flags.agent_memory_capacity if flags.kept else 0
    reference = config.model.peft is not None
    return Playing(episodes, config.rl.rl_epochs, reference, kept, config.tasks.task_chunk_tokens)
