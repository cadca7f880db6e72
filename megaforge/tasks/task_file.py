"""What a task asks: one of ours by its name, or a YAML file that says more.

task: passkey                # one of ours, or
prompts: questions.jsonl     # objects with "prompt" and "answer" (or "answers"), beside this file, or
questions: gsm8k_test.jsonl  # lines of GSM8K, MATH or a choice, beside this file (docs/tasks.md)
metrics: [exact_match, bleu]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.config.fields import flag
from megaforge.config.question_config import QuestionConfig
from megaforge.config.yaml_nodes import compose, read_dataclass
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.registry import TASKS, TEXT_METRICS
from megaforge.tasks.example import Example, Room, Task, make_example
from megaforge.tasks.questions import read_questions

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskSettings:
    """A task file."""

    name: str | None = flag(None, "what results are called (default: the task's name, or the file's)")
    task: str | None = flag(None, "makes the examples", choices=TASKS)
    prompts: str | None = flag(None, "JSON Lines with a prompt, and an answer or answers, in each object")
    metrics: tuple[str, ...] = flag((), "by which answers are judged (default: the task's own, or exact_match)")
    lengths: tuple[int, ...] = flag((), "tokens of prompt and answer, of examples that are made", least=1)
    examples: int | None = flag(None, "how many, of each length", least=1)
    max_new_tokens: int | None = flag(None, "of an answer (default: 8 more than the right one has)", least=1)
    stop: tuple[str, ...] = flag((), "texts that end an answer (default: the task's own, or a line end)")
    seed: int = flag(0, "of the examples", least=0)
    questions: str | None = flag(None, "JSON Lines of GSM8K, MATH or a choice (megaforge.tasks.questions)")

    def validate(self) -> None:
        """
        Raises:
            UserError: not one of ``task``, ``prompts`` and ``questions``, or a metric that is none.
        """
        if (self.task, self.prompts, self.questions).count(None) != 2:
            raise UserError("give either task (one of ours), or prompts or questions (a JSON Lines file)")
        if self.task is None and self.lengths:
            raise UserError("lengths are of a task that makes its examples; leave them out beside prompts or questions")
        for name in self.metrics:
            TEXT_METRICS.check(name)

    @property
    def judged_by(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return self.metrics or ("exact_match" if self.task is None else _made_by(self.task).metric,)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return self.stop or (("\n",) if self.task is None else _made_by(self.task).stops)

    def examples_of(self, length: int, count: int, size: Callable[[str], int]) -> list[Example]:
        """``count`` examples that are made, of at most ``length`` tokens as ``size`` counts them; or the first so many
        of the file.

        Raises:
            UserError: the length is too small, or the file is bad.
        """
        if self.task is not None:
            room = Room(length, size)
            return [make_example(self.task, self.seed, index, room) for index in range(count)]
        return self.of_file()[:count]

    def of_file(self) -> list[Example]:
        """All examples of a file.

        Raises:
            UserError: it cannot be read, or a line is something else.
        """
        if self.questions is not None:
            return [Example(one.prompt, (one.answer,)) for one in read_questions(self.questions, QuestionConfig())]
        assert self.prompts is not None
        return read_examples(self.prompts)


def _made_by(task: str) -> Task:
    made: Task = TASKS.get(task)
    return made


def read_task(name: str) -> TaskSettings:
    """One of our tasks, or a file of one.

    Raises:
        UserError: no task has this name; or the file has an unknown key, a bad value or no prompts.
    """
    if not name.endswith(SUFFIXES):
        TASKS.check(name)
        return TaskSettings(name=name, task=name)
    settings = read_dataclass(TaskSettings, compose(read_text(name), name), name, "the task")
    changed: dict[str, Any] = {"name": settings.name or settings.task or Path(name).stem}
    for key in ("prompts", "questions"):
        if (file := getattr(settings, key)) is not None:
            changed[key] = str(Path(name).parent / file)
    found = TaskSettings(**{**vars(settings), **changed})
    if found.task is None:
        _ = found.of_file()
    return found


def read_examples(path: str) -> list[Example]:
    """The objects of a JSON Lines file.

    Raises:
        UserError: it cannot be read, or a line is something else.
    """
    examples = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error})") from error
        record = record if isinstance(record, dict) else {}
        answers = record.get("answers", [record["answer"]] if "answer" in record else [])
        texts = [record.get("prompt"), *(answers if isinstance(answers, list) else [None])]
        if not all(isinstance(text, str) and text for text in texts):
            raise UserError(f'{path}: line {number} is no example; give {{"prompt": "...", "answer": "..."}}')
        examples.append(Example(texts[0], tuple(texts[1:])))
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def read_text(path: str) -> str:
    """The content of a file of ``--tasks``.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--tasks {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--tasks {path}: byte {error.start} is not UTF-8") from error
