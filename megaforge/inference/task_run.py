"""Tasks that a model answers, and what its answers are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaforge.data.tokenizer import Tokenizer
from megaforge.inference.leading import Ask
from megaforge.inference.requests import Likelihood, Request, Scored, Writing
from megaforge.registry import TEXT_METRICS
from megaforge.tasks.example import Example
from megaforge.tasks.intervals import interval
from megaforge.tasks.metrics import Sums, TextMetric
from megaforge.tasks.task_file import TaskSettings

BITS = "answer_bits_per_byte"
FURTHER = 8  # tokens beyond those of the right answer


@dataclass(frozen=True)
class Result:
    """One metric of one task at one length.

    Attributes:
        length: tokens of its prompts and answers; None where they come from a file.
        low, high: a 95 % confidence interval.
        higher_is_better: None: it only describes.
    """

    task: str
    metric: str
    length: int | None
    examples: int
    value: float
    low: float
    high: float
    higher_is_better: bool | None


class _BitsPerByte:
    """How well right answers are predicted: bits for each byte of them, over all examples."""

    higher_is_better: bool | None = False

    def sums(self, text: str, answers: Sequence[str]) -> Sums:
        raise NotImplementedError("made of probabilities, not of texts")

    def value(self, totals: Sequence[float], examples: int) -> float:
        return totals[0] / totals[1] if totals[1] else 0.0


@dataclass(frozen=True)
class TaskRun:
    """Asks a model all that a task wants to know.

    Attributes:
        ask: the model.
        lengths: of tasks that do not say their own.
        examples: how many of each length, where the task does not say.
    """

    ask: Ask
    tokenizer: Tokenizer
    lengths: tuple[int, ...]
    examples: int

    def results(self, task: TaskSettings) -> tuple[list[Result], list[dict[str, Any]]]:
        """What came out, and each example with what was written."""
        lengths: tuple[int | None, ...] = (None,) if task.task is None else task.lengths or self.lengths
        results: list[Result] = []
        samples: list[dict[str, Any]] = []
        for length in lengths:
            count = task.examples or self.examples
            examples = task.examples_of(length or 0, count, lambda text: len(self.tokenizer.encode(text)))
            written, bits = self._answers(task, examples)
            for name in task.judged_by:
                metric: TextMetric = TEXT_METRICS.get(name)
                sums = [metric.sums(text, one.answers) for text, one in zip(written, examples, strict=True)]
                results.append(_result(task, name, metric, length, sums))
            if bits:
                results.append(_result(task, BITS, _BitsPerByte(), length, bits))
            samples += [
                {"task": task.name, "length": length, "prompt": one.prompt, "answers": one.answers, "written": text}
                for one, text in zip(examples, written, strict=True)
            ]
        return results, samples

    def _answers(self, task: TaskSettings, examples: Sequence[Example]) -> tuple[list[str], list[Sums]]:
        """What the model writes, and (bits, bytes) of the right answers where examples have some."""
        pairs = [self._tokens(one) for one in examples]
        requests: list[Request] = [
            Writing(prompt, task.max_new_tokens or len(answer) + FURTHER, task.stops) for prompt, answer in pairs
        ]
        right = [(one, *pair) for one, pair in zip(examples, pairs, strict=True) if pair[1]]
        requests += [Likelihood(prompt, answer) for _, prompt, answer in right]
        answers = self.ask(requests)
        scored = [answer for answer in answers if isinstance(answer, Scored)]
        bits: list[Sums] = [
            (-found.log_probability / math.log(2), float(len(one.answer.encode())))
            for found, (one, *_) in zip(scored, right, strict=True)
        ]
        return [answer for answer in answers if isinstance(answer, str)], bits

    def _tokens(self, example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the prompt, and of the answer behind it."""
        prompt = tuple(self.tokenizer.encode(example.prompt))
        if not example.answers:
            return prompt, ()
        whole = tuple(self.tokenizer.encode(example.text))
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return prompt, whole[len(prompt) :]
        return prompt, tuple(self.tokenizer.encode(example.answer))


def _result(task: TaskSettings, name: str, metric: TextMetric, length: int | None, sums: Sequence[Sums]) -> Result:
    totals = [math.fsum(column) for column in zip(*sums, strict=True)]
    value = metric.value(totals, len(sums))
    low, high = interval(metric, sums)
    return Result(task.name or "", name, length, len(sums), value, low, high, metric.higher_is_better)
