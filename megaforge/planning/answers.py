"""How large the answers of ``--objective rlvr`` are, as far as a configuration tells it."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.config import Config
from megaforge.data.task_source import task_of
from megaforge.inference.generation import PREFILL_CHUNK
from megaforge.reasoning.packing import rounded
from megaforge.tasks.chunked import make_chunked

_LOOKED_AT = 16  # examples of a task, whose questions may be of several lengths


@dataclass(frozen=True)
class Answers:
    """Sizes of what a model is asked and writes, in tokens, of which a word of a task is one.

    Attributes:
        prompt: the longest that is read.
        longest: a prompt and what is written behind it.
        answer, memory: that are written, at most: an answer, and behind each chunk of a text that is read.
        turns: in which a text is read and answered.
        group: answers to one question.
        at_once: that a rank writes side by side.
        tries: how often a group is written, at most (``--rl-resample``).
    """

    prompt: int
    longest: int
    answer: int
    memory: int
    turns: int
    group: int
    at_once: int
    tries: int

    def rows(self, samples: int, length: int) -> int:
        """Of ``length`` tokens, that the turns of so many samples fill at most."""
        return rounded(-(-samples * self.turns // max(1, length // self.longest)))

    def batches(self, samples: int) -> list[int]:
        """How many texts are written side by side, one batch after the other."""
        whole, rest = divmod(samples, self.at_once)
        return [self.at_once] * whole + [rest] * bool(rest)

    def prompts(self, texts: int, turn: int) -> int:
        """That are read for so many texts, at most: those of a group are asked the same, until each has a memory."""
        return texts if turn else min(texts, -(-texts // self.group) + 1)

    def steps(self, turn: int) -> int:
        """Of one token of each text, at most: the first is drawn behind the prompt."""
        return (self.answer if turn == self.turns - 1 else self.memory) - 1

    @property
    def pieces(self) -> tuple[int, int]:
        """(prompts that are read together, pieces that each is read in)."""
        return max(1, PREFILL_CHUNK // self.prompt), -(-self.prompt // PREFILL_CHUNK)


def answers_of(config: Config) -> Answers:
    """Those of a run.

    Raises:
        UserError: the task has no example of this size.
    """
    how, flags = config.rollout, config.rl
    name, length = task_of(config.data), config.data.seq_length
    written = {"answer": how.rl_max_new_tokens, "group": flags.rl_group_size, "at_once": how.rl_rollout_batch_size}
    written |= {"memory": how.rl_memory_tokens, "tries": 1 + flags.rl_resample}
    if name is None:  # how long questions are says a file alone: as long as a row allows
        prompt = max(1, length - how.rl_max_new_tokens)
        return Answers(prompt=prompt, longest=length, turns=1, **written)
    size = config.tasks.task_chunk_tokens
    examples = [
        make_chunked(name, config.training.seed, number, how.rl_task_chunks, size) for number in range(_LOOKED_AT)
    ]
    question = max(len(one.question.split()) for one in examples)
    text = max(len(" ".join(one.chunks).split()) for one in examples)
    if how.rl_chunk_tokens is None:
        prompt = text + question
        return Answers(prompt=prompt, longest=prompt + how.rl_max_new_tokens, turns=1, **written)
    fixed = len(_own_words(how.rl_reading_prompt)) + how.rl_memory_tokens + question
    chunk = min(how.rl_chunk_tokens, text)
    longest = fixed + max(chunk + how.rl_memory_tokens, how.rl_max_new_tokens)
    return Answers(prompt=fixed + chunk, longest=longest, turns=1 + -(-text // how.rl_chunk_tokens), **written)


def _own_words(template: str) -> list[str]:
    for name in ("{memory}", "{chunk}", "{question}"):
        template = template.replace(name, " ")
    return template.split()
