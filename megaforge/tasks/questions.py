"""Questions with answers that can be checked, from JSON Lines files as people publish them: GSM8K's, MATH's, and those
of a choice (LogiQA, HellaSwag, MMLU, ARC).

A form is a row of :data:`megaforge.registry.QUESTION_FORMATS`; a file of ``--extensions`` may register another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from megaforge.config.question_config import PLACE, QuestionConfig
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.registry import QUESTION_FORMATS
from megaforge.tasks.answers import MARK, last_box, result

SCHEME = "questions://"
_KEPT = 4  # files whose questions stay in memory: they are looked at before torch is imported, and read after that


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        prompt: what a model goes on from.
        answer: what is right, short: what rewards compare with.
        worked: what a model learns to write; empty: the answer itself.
        choices: the texts among which the answer is a letter; empty: it is no choice.
        place: its file and line, for messages.
    """

    prompt: str
    answer: str
    worked: str = ""
    choices: tuple[str, ...] = ()
    place: str = ""

    @property
    def learnt(self) -> str:
        """What a model learns to write."""
        return self.worked or self.answer


class Told(NamedTuple):
    """What a line says: the question, its answer, how it is worked out, and what there is to choose from."""

    question: str
    answer: str
    worked: str = ""
    choices: tuple[str, ...] = ()


class BadRow(Exception):
    """What a line lacks, as the end of a sentence."""


@dataclass(frozen=True)
class QuestionFormat:
    """A form of lines.

    Attributes:
        fields: of each role that a line must have (question, answer, choices), what people call it.
        tell: ``tell(values, record)``: what a line says, from its values by their roles; raises :class:`BadRow`.
    """

    fields: Mapping[str, Sequence[str]]
    tell: Callable[[Mapping[str, Any], Mapping[str, Any]], Told]

    def names(self, record: Mapping[str, Any], given: Mapping[str, str | None]) -> dict[str, str] | None:
        """What the fields of a line are called, of each role the first that is there; None: one is missing."""
        found = {}
        for role, usual in self.fields.items():
            own = given.get(role)
            there = [name for name in ((own,) if own is not None else usual) if name in record]
            if not there:
                return None
            found[role] = there[0]
        return found


def _worked(values: Mapping[str, Any], record: Mapping[str, Any]) -> Told:
    """GSM8K: the answer is worked out, and its result stands behind ``####``; without that all of it is the result."""
    question, answer = _text(values, "question"), _text(values, "answer")
    short = result(answer)
    if not short:
        raise BadRow(f"nothing stands behind {MARK}")
    return Told(question, short, answer)


def _boxed(values: Mapping[str, Any], record: Mapping[str, Any]) -> Told:
    r"""MATH: the result is in the solution's last ``\boxed{}``."""
    question, solution = _text(values, "question"), _text(values, "answer")
    box = last_box(solution)
    if not box:
        raise BadRow("its solution has no \\boxed{...}, or nothing in it")
    return Told(question, box, solution)


def _choice(values: Mapping[str, Any], record: Mapping[str, Any]) -> Told:
    """The right one is told by its number from 0, by its letter, or by its label."""
    question, choices, right = _text(values, "question"), values["choices"], values["answer"]
    labels: Sequence[Any] = ascii_uppercase
    if isinstance(choices, Mapping):  # ARC: {"text": [...], "label": [...]}
        labels, choices = choices.get("label", ascii_uppercase), choices.get("text")
    if not isinstance(choices, list) or not all(isinstance(one, str) and one.strip() for one in choices):
        raise BadRow("its choices are no list of texts")
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise BadRow(f"it has {len(choices)} choices, not 2 to {len(ascii_uppercase)}")
    number = _number_of(right, list(labels)[: len(choices)])
    if number is None or not 0 <= number < len(choices):
        raise BadRow(f"{right!r} is not one of its {len(choices)} choices")
    lines = [f"{letter}. {text.strip()}" for letter, text in zip(ascii_uppercase, choices, strict=False)]
    before = record.get("context", record.get("passage"))
    whole = [before] if isinstance(before, str) and before.strip() else []
    return Told("\n".join([*whole, question, *lines]), ascii_uppercase[number], "", tuple(choices))


def _number_of(right: Any, labels: Sequence[Any]) -> int | None:
    if right in labels and not isinstance(right, bool):
        return labels.index(right)
    if isinstance(right, str) and right.strip().isdecimal():
        return int(right)
    return right if isinstance(right, int) and not isinstance(right, bool) else None


def _text(values: Mapping[str, Any], role: str) -> str:
    value = values[role]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"its {role} is empty or no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"its {role} has half a character ({value[error.start]!r})") from error
    return value.strip()


CHOICE = QuestionFormat(
    {
        "question": ("question", "query", "ctx"),
        "choices": ("choices", "options", "endings"),
        "answer": ("answer", "correct_option", "answerKey", "label"),
    },
    _choice,
)
BOXED = QuestionFormat({"question": ("problem",), "answer": ("solution",)}, _boxed)
WORKED = QuestionFormat({"question": ("question", "prompt"), "answer": ("answer",)}, _worked)


def read_questions(path: str, flags: QuestionConfig) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        UserError: it cannot be read or holds none, or a line is no question; with the file and the line.
    """
    return list(_read(path, flags))


@lru_cache(_KEPT)
def _read(path: str, flags: QuestionConfig) -> tuple[Question, ...]:
    form: QuestionFormat | None = None if flags.question_format is None else QUESTION_FORMATS.get(flags.question_format)
    found = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            place = f"{path}: line {number}"
            record = _record(line, place)
            form = form or _form_of(record, flags, place)
            found.append(_question(form, record, flags, place))
    if not found:
        raise UserError(f"{path}: it holds no question; give a JSON object a line")
    return tuple(found)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{SCHEME}{path}: it cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{SCHEME}{path}: byte {error.start} is not UTF-8") from error


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f'{place}: give an object, such as {{"question": "6 * 7?", "answer": "#### 42"}}')
    return record


def _given(flags: QuestionConfig) -> dict[str, str | None]:
    """Names of fields that the flags say, by their roles."""
    return {"question": flags.question_field, "answer": flags.answer_field, "choices": flags.choices_field}


def _form_of(record: Mapping[str, Any], flags: QuestionConfig, place: str) -> QuestionFormat:
    """The first form whose fields a line has."""
    given = _given(flags)
    for name in QUESTION_FORMATS.names():
        form: QuestionFormat = QUESTION_FORMATS.get(name)
        if (given["choices"] is None or "choices" in form.fields) and form.names(record, given) is not None:
            return form
    wanted = [name for name in given.values() if name is not None]
    missing = [name for name in wanted if name not in record]
    said = f"it has no field {missing[0]!r}" if missing else "no form of questions has these fields"
    raise UserError(
        f"{place}: {said} (there are {', '.join(map(repr, record)) or 'none'}); name them by --question-field, "
        "--answer-field and --choices-field"
    )


def _question(form: QuestionFormat, record: Mapping[str, Any], flags: QuestionConfig, place: str) -> Question:
    names = form.names(record, _given(flags))
    if names is None:
        usual = ", ".join(f"{role} ({' or '.join(names)})" for role, names in form.fields.items())
        raise UserError(
            f"{place}: it has the fields {', '.join(map(repr, record)) or 'none'}, and needs {usual}; name them by "
            "--question-field, --answer-field and --choices-field, or mend the line"
        )
    try:
        told = form.tell({role: record[name] for role, name in names.items()}, record)
    except BadRow as error:
        raise UserError(f"{place}: {error}; mend the line or leave it out") from error
    return Question(flags.question_template.replace(PLACE, told.question), *told[1:], place=place)
