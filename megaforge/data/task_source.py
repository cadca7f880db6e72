"""``--data-path tasks://NAME``: windows of a task in chunks with their answers, made as they are read.

A sample is several documents: some words of chunks, the question, and the answer, which alone is learnt.
"""

from __future__ import annotations

import functools
from dataclasses import astuple
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.config.run_config import DataConfig
from megaforge.config.task_config import TaskConfig
from megaforge.data.data_source import DataSourceKind
from megaforge.data.sample_schedule import Plan, SampleSchedule, ScheduledSource, make_state
from megaforge.data.sidecar import digest_of
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.registry import CHUNKED_TASKS, OBJECTIVES
from megaforge.tasks.chunked import make_window

_SCHEME, _VERSION = "tasks://", 1
_TRIED = 64  # windows that are made at the start, to see whether samples have room for them
_KEPT = 64  # samples that stay in memory between their tokens and their weights are asked for, by some threads at once


class _Documents(NamedTuple):
    """What a sample is made of: token ids, where documents begin, and which tokens are learnt."""

    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.bool_]
    learnt: npt.NDArray[np.bool_]


class TaskWindows(ScheduledSource):
    """Endless samples of a task; sample k is a pure function of (seed, k), whatever the layout.

    Args:
        schedule: seed, sequence length and later changes.
        name: of the task.
        part: train or valid, which differ in all samples.

    Raises:
        UserError: samples or windows are too short for the task.
    """

    def __init__(
        self, schedule: SampleSchedule, name: str, sizes: TaskConfig, tokenizer: Tokenizer, part: str = "train"
    ) -> None:
        self.notices: list[str] = []
        self.plan = Plan(schedule, [1.0])
        self.digest = digest_of(["tasks", _VERSION, name, *astuple(sizes)])
        self._schedule, self._name, self._sizes, self._tokenizer, self._part = schedule, name, sizes, tokenizer, part
        self._documents = functools.lru_cache(_KEPT)(self._make)
        for number in range(_TRIED):
            self._check(len(self._window(number)[0]), schedule.sequence_length)

    def _window(self, number: int) -> tuple[list[int], list[bool]]:
        """The ids of a window with its questions and answers, and which of them are learnt."""
        sizes = self._sizes
        one = make_window(
            self._name, self._schedule.seed, number, sizes.task_window, sizes.task_chunk_tokens, sizes.task_questions
        )
        said = [" ".join(one.text)]
        for question, answers in one.asked:
            said += [" " + " ".join(question), " " + " ".join(answers)]
        ids, learnt = list[int](), list[bool]()
        for place, own in enumerate(self._tokenizer.encode_batch(said)):
            ids += own
            learnt += [place > 0 and place % 2 == 0] * len(own)
        end = [] if self._tokenizer.eod is None else [self._tokenizer.eod]
        return ids + end, learnt + [True] * len(end)

    def _check(self, length: int, room: int) -> None:
        if length > room + 1:
            raise UserError(
                f"--data-path {_SCHEME}{self._name}: a window with its question and answer has {length} tokens, more "
                f"than --seq-length {room}; give at least {length - 1}, or a shorter --task-window"
            )

    def _make(self, k: int, length: int) -> _Documents:
        """Sample ``k`` of ``length`` tokens: windows one after the other, as many as fit whole."""
        ids, starts, learnt = np.zeros(length, np.int64), np.zeros(length, np.bool_), np.zeros(length, np.bool_)
        filled, first = 0, 2 * k * length + (self._part != "train") * length
        for number in range(first, first + length):
            window, answers = self._window(number)
            end = filled + len(window)
            if end > length:
                break
            ids[filled:end], starts[filled], learnt[filled:end] = window, True, answers
            filled = end
        self._check(len(window) if not filled else 0, length - 1)
        if filled < length:
            starts[filled] = True  # what fills the sample up is a document of its own
        return _Documents(ids, starts, learnt)

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        """Writes sample ``k`` and its document starts, [S + n] each."""
        made = self._documents(k, len(tokens))
        tokens[:], marks[:] = made.ids, made.starts
        return len(tokens) - 1

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        counts[~self._documents(k, len(counts) + 1).learnt[1:]] = 0.0

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """As :meth:`megaforge.data.samples.TrainingData.state`."""
        state = make_state(self.plan, self.digest, ((1.0, 0.0, 0.0), "sequential"), consumed_samples)
        return state | {"sources": [{"digest": self.digest, "choices": None}]}

    def validation(self, split: str = "valid") -> TaskWindows:
        """Other samples of the same task, as endless as these."""
        return TaskWindows(self._schedule, self._name, self._sizes, self._tokenizer, part=split)


class EpisodeNumbers(TaskWindows):
    """Training samples that stand for episodes, which an agent plays by their numbers: their tokens are all 0, and none
    is learnt. Validation samples are the same as ever."""

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        if self._part != "train":
            return super().fill(k, tokens, marks)
        tokens[:], marks[:] = 0, False
        return len(tokens) - 1

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        if self._part != "train":
            super().weigh(k, counts)
        else:
            counts[:] = 0.0


def task_of(data: DataConfig) -> str | None:
    """The NAME of ``--data-path tasks://NAME``; None of other data.

    Raises:
        UserError: no task has this name.
    """
    if len(data.data_path) != 1 or not data.data_path[0].startswith(_SCHEME):
        return None
    name = data.data_path[0].removeprefix(_SCHEME)
    try:
        CHUNKED_TASKS.check(name)
    except UserError as error:
        raise UserError(f"--data-path {data.data_path[0]}: {error}") from error
    return name


def check(config: Config) -> None:
    """What can be seen before torch is imported.

    Raises:
        UserError: no task has this name, the window is too short for it, or there is no tokenizer.
    """
    name, data = task_of(config.data), config.data
    assert name is not None
    _ = make_window(name, config.training.seed, 0, config.tasks.task_window, config.tasks.task_chunk_tokens)
    if data.tokenizer_model is None and data.vocab_file is None:
        raise UserError(
            f"--data-path {data.data_path[0]}: words need a tokenizer: add --tokenizer-model FILE, which "
            f"python tools/make_task_tokenizer.py --tasks {name} --output FILE makes"
        )


def open_tasks(config: Config, tokenizer: Tokenizer | None) -> TaskWindows:
    """
    Raises:
        UserError: as :class:`TaskWindows`.
    """
    name = task_of(config.data)
    assert name is not None and tokenizer is not None, "looked at by check"
    plays = getattr(OBJECTIVES.get(config.training.objective), "plays", False)
    kind = EpisodeNumbers if plays else TaskWindows
    return kind(SampleSchedule.of(config), name, config.tasks, tokenizer)


TASKS = DataSourceKind(open_tasks, check)
