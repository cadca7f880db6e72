"""The texts that episodes are about, as tokens: examples of a task in chunks."""

from __future__ import annotations

from functools import lru_cache

from megaforge.config.config import Config
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.data.task_source import task_of
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.reasoning.packing import Tokens
from megaforge.tasks.chunked import make_chunked

TextTokens = tuple[tuple[Tokens, ...], Tokens, Tokens]
_KEPT = 4096  # examples whose tokens stay in memory: those of a global batch, for the groups that read them


class TaskTexts:
    """Example number k of the task of ``--data-path tasks://NAME``.

    Attributes:
        tokenizer: of their words.
    """

    def __init__(self, config: Config, chunks: int | None = None) -> None:
        """``chunks``: of an example, if not ``--agent-chunks``.

        Raises:
            UserError: the data is no task.
        """
        name, tokenizer = task_of(config.data), with_run_tokenizer(config)[1]
        if name is None or tokenizer is None:
            raise UserError(
                "--objective agent: there are no episodes: give --data-path tasks://NAME, and --tokenizer-model FILE"
            )
        seed, size = config.training.seed, config.tasks.task_chunk_tokens
        number = config.rl.agent_chunks if chunks is None else chunks

        @lru_cache(_KEPT)
        def texts(index: int) -> TextTokens:
            return example_tokens(name, tokenizer, seed, index, number, size)

        self.of, self.tokenizer = texts, tokenizer


def example_tokens(name: str, tokenizer: Tokenizer, seed: int, index: int, chunks: int, size: int) -> TextTokens:
    """Example number ``index`` of a task, of ``chunks`` chunks of ``size`` words: chunks, question and answer."""
    example = make_chunked(name, seed, index, chunks, size)
    *read, question, answer = (
        tuple(ids) for ids in tokenizer.encode_batch([*example.chunks, example.question, " " + example.answer])
    )
    return tuple(read), question, answer
