"""What a model is asked: examples of a task in chunks, or questions of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from megaforge.config.config import Config
from megaforge.data.question_source import file_of, questions_of
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.data.task_source import task_of
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.reasoning.packing import Tokens
from megaforge.tasks.chunked import make_chunked
from megaforge.tasks.questions import Question

_KEPT = 4096  # prompts whose tokens stay in memory: those of a global batch


@dataclass(frozen=True)
class Asked:
    """
    Attributes:
        question: with its answer, as rewards see it.
        prompt: tokens that the model goes on from.
    """

    question: Question
    prompt: Tokens


class Prompts:
    """Prompt number k of ``--data-path tasks://NAME`` or ``questions://FILE``: a function of the run's seed and k.

    Attributes:
        tokenizer: of the run.
    """

    def __init__(self, config: Config) -> None:
        """
        Raises:
            UserError: the data asks nothing.
        """
        tokenizer = with_run_tokenizer(config)[1]
        if tokenizer is None:
            raise UserError("--objective rlvr: text needs a tokenizer: add --tokenizer-model FILE")
        self.tokenizer: Tokenizer = tokenizer
        question_of = _questions(config)

        @lru_cache(_KEPT)
        def of(index: int) -> Asked:
            question = question_of(index)
            return Asked(question, tuple(tokenizer.encode(question.prompt)))

        self.of = of


def _questions(config: Config) -> Callable[[int], Question]:
    if file_of(config.data) is not None:
        return questions_of(config).of
    name = task_of(config.data)
    if name is None:
        raise UserError("--objective rlvr: nothing is asked: give --data-path tasks://NAME or questions://FILE")
    sizes, seed = config.tasks, config.training.seed
    return lambda index: task_question(name, seed, index, config.rollout.rl_task_chunks, sizes.task_chunk_tokens)


def task_question(name: str, seed: int, index: int, chunks: int, size: int) -> Question:
    """Example number ``index`` of a task, its text in the prompt."""
    example = make_chunked(name, seed, index, chunks, size)
    return Question(" ".join([*example.chunks, example.question]), example.answer)
