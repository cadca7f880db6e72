"""Flags of answers that a model writes to learn from: ``--objective rlvr``."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError
from megaforge.registry import TOOLS


@dataclass(frozen=True)
class RolloutConfig:
    """Answers that a model writes, to be rewarded for (--objective rlvr)."""

    rl_max_new_tokens: int = flag(
        64, "--objective rlvr: tokens of an answer, at most, its end included", least=1, most=1 << 24
    )
    rl_temperature: float = flag(1.0, "--objective rlvr: of the draws, and of the policy that is trained", above=0)
    rl_rollout_batch_size: int = flag(
        64, "--objective rlvr: answers that a rank writes side by side", least=1, most=1 << 20
    )
    rl_task_chunks: int = flag(
        3, "--objective rlvr with tasks://: chunks of a text, --task-chunk-tokens words each", least=1, most=1 << 24
    )

    rl_tools: tuple[str, ...] = flag(
        (),
        "--objective rlvr: what answers the model while it writes: calculator, or one of a file of --extensions; its "
        "tokens are not the model's, and teach nothing",
        metavar="NAME",
    )
    rl_chunk_tokens: int | None = flag(
        None,
        "--objective rlvr with tasks://: the text is read in chunks of so many tokens, with a memory that the model "
        "writes anew behind each; by default it stands in the prompt",
        least=1,
        most=1 << 24,
    )
    rl_memory_tokens: int = flag(32, "with --rl-chunk-tokens: of the memory, at most", least=1, most=1 << 24)
    rl_reading_prompt: str = flag(
        "{memory} {chunk} {question}",
        "with --rl-chunk-tokens: what the model sees; behind the last chunk {chunk} is empty",
    )

    def validate(self) -> None:
        """
        Raises:
            UserError: the prompt lacks what is to be read, or there is no such tool.
        """
        for name in self.rl_tools:
            try:
                TOOLS.check(name)
            except UserError as error:
                raise UserError(f"--rl-tools {' '.join(self.rl_tools)}: {error}") from error
        for name in ("{memory}", "{chunk}", "{question}"):
            if self.rl_reading_prompt.count(name) != 1:
                raise UserError(
                    f"--rl-reading-prompt {self.rl_reading_prompt!r}: it must name {name} once, as in "
                    "'{question} {memory} {chunk}'"
                )
