"""What a model is asked: examples of a task in chunks, or questions of a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from megaforge.config.config import Config
from megaforge.data.question_source import file_of, questions_of
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.data.task_source import task_of
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.reasoning.rlvr.conversation import Asked, in_chunks
from megaforge.tasks.chunked import ChunkedExample, make_chunked
from megaforge.tasks.questions import Question

_KEPT = 4096  # prompts whose tokens stay in memory: those of a global batch


class Prompt(NamedTuple):
    """
    Attributes:
        question: with its answer, as rewards see it.
        asked: as the model sees it.
    """

    question: Question
    asked: Asked


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
        self.of = lru_cache(_KEPT)(_maker(config, tokenizer))


def _maker(config: Config, tokenizer: Tokenizer) -> Callable[[int], Prompt]:
    if file_of(config.data) is not None:
        questions = questions_of(config)
        return lambda index: _whole(questions.of(index), tokenizer)
    name = task_of(config.data)
    if name is None:
        raise UserError("--objective rlvr: nothing is asked: give --data-path tasks://NAME or questions://FILE")
    chunks, size, read = config.rollout.rl_task_chunks, config.tasks.task_chunk_tokens, config.rollout.rl_chunk_tokens
    seed = config.training.seed
    return lambda index: task_prompt(make_chunked(name, seed, index, chunks, size), tokenizer, read)


def _whole(question: Question, tokenizer: Tokenizer) -> Prompt:
    return Prompt(question, Asked(tuple(tokenizer.encode(question.prompt))))


def task_prompt(example: ChunkedExample, tokenizer: Tokenizer, read: int | None) -> Prompt:
    """What a task asks; ``read``: its text is read in chunks of so many tokens, and not in the prompt."""
    text = " ".join(example.chunks)
    question = Question(f"{text} {example.question}", example.answer)
    if read is None:
        return _whole(question, tokenizer)
    chunks = in_chunks(tuple(tokenizer.encode(text)), read)
    return Prompt(question, Asked(tuple(tokenizer.encode(example.question)), chunks))
