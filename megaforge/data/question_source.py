"""``--data-path questions://FILE.jsonl``: questions, of whose answers a model learns every token, or which it answers
itself and is rewarded for.

A sample of supervised training is several questions with their worked answers, each a document that sees no other; the
answers alone are learnt. A sample of reinforcement learning stands for an answer that is written to a question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.config.run_config import DataConfig
from megaforge.data.chat import ChatData, Conversation
from megaforge.data.data_source import DataSource, DataSourceKind, SampleView
from megaforge.data.sample_order import key_of, shuffled
from megaforge.data.sidecar import digest_of
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.registry import OBJECTIVES
from megaforge.tasks.questions import SCHEME, Question, read_questions

_KEPT = 16  # orders of passes that stay in memory: groups that are drawn again are of others


class QuestionReader:
    """Questions as what :class:`megaforge.data.chat.ChatData` packs."""

    noun = "questions"

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._flags, self._tokenizer = config.questions, tokenizer

    def read(self, file: str) -> Iterator[Conversation]:
        """
        Raises:
            UserError: as :func:`megaforge.tasks.questions.read_questions`.
        """
        if not file.startswith(SCHEME):
            raise UserError(f"--valid-data-path {file}: give {SCHEME}FILE.jsonl, as --data-path is")
        end = [] if self._tokenizer.eod is None else [self._tokenizer.eod]
        for one in read_questions(file.removeprefix(SCHEME), self._flags):
            asked, said = self._tokenizer.encode_batch([one.prompt, " " + one.learnt])
            yield Conversation([*asked, *said, *end], [False] * len(asked) + [True] * (len(said) + len(end)))


class QuestionOrder:
    """The questions of a file again and again, each pass in another order: number k is a function of the file, the seed
    and k alone.

    Attributes:
        digest: of all questions.
    """

    def __init__(self, questions: Sequence[Question], seed: int) -> None:
        self._questions, self._seed = questions, seed
        self.digest = digest_of([[one.prompt, one.answer, one.worked] for one in questions])
        self._order_of = lru_cache(_KEPT)(self._shuffled)

    def __len__(self) -> int:
        return len(self._questions)

    def of(self, number: int) -> Question:
        """Question number ``number``, without end."""
        epoch, place = divmod(number, len(self))
        return self._questions[int(self._order_of(epoch)[place])]

    def _shuffled(self, epoch: int) -> npt.NDArray[np.intp]:
        return shuffled(key_of("questions", self._seed, self.digest, epoch), np.arange(len(self)))


class QuestionNumbers(DataSource):
    """Training samples that stand for answers, which a model writes by their numbers: their tokens are all 0, and none
    is learnt. Validation samples are those of supervised training."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        """
        Raises:
            UserError: the file cannot be read, or a line is not a question.
        """
        self._config, self._tokenizer = config, tokenizer
        self._order = questions_of(config)
        self.notices = [f"{config.data.data_path[0]}: {len(self._order)} questions"]

    def sequence_length(self, k: int) -> int:
        return self._config.data.seq_length

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        tokens[:], marks[:] = 0, False
        return len(tokens) - 1

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        counts[:] = 0.0

    def tokens_before(self, samples: int) -> int:
        return samples * self._config.data.seq_length

    def state(self, consumed_samples: int) -> dict[str, Any]:
        return {"digest": self._order.digest, "seed": self._config.training.seed}

    def validation(self, split: str = "valid") -> SampleView:
        return ChatData(self._config, QuestionReader(self._config, self._tokenizer)).validation(split)


def file_of(data: DataConfig) -> str | None:
    """The FILE of ``--data-path questions://FILE``; None of other data."""
    if len(data.data_path) != 1 or not data.data_path[0].startswith(SCHEME):
        return None
    return data.data_path[0].removeprefix(SCHEME)


def questions_of(config: Config) -> QuestionOrder:
    """The questions of ``--data-path questions://FILE``.

    Raises:
        UserError: the file cannot be read, or a line is not a question.
    """
    file = file_of(config.data)
    assert file is not None, "the kind of data says so"
    return QuestionOrder(read_questions(file, config.questions), config.training.seed)


def check(config: Config) -> None:
    """What can be seen before torch is imported.

    Raises:
        UserError: the file cannot be read, a line is not a question, or there is no tokenizer.
    """
    data, file = config.data, file_of(config.data)
    assert file is not None
    _ = read_questions(file, config.questions)
    if data.tokenizer_model is None and data.vocab_file is None:
        raise UserError(f"--data-path {data.data_path[0]}: text needs a tokenizer: add --tokenizer-model FILE")


def open_questions(config: Config, tokenizer: Tokenizer | None) -> DataSource:
    """
    Raises:
        UserError: a file cannot be read or holds nothing to learn.
    """
    assert tokenizer is not None, "looked at by check"
    if getattr(OBJECTIVES.get(config.training.objective), "plays", False):
        return QuestionNumbers(config, tokenizer)
    return ChatData(config, QuestionReader(config, tokenizer))


QUESTIONS = DataSourceKind(open_questions, check, reads=("valid_data_path",))
