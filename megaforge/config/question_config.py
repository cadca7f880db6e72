"""Flags of questions with answers that can be checked: ``--data-path questions://FILE.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError
from megaforge.registry import QUESTION_FORMATS

PLACE = "{question}"


@dataclass(frozen=True)
class QuestionConfig:
    """Questions with answers (--data-path questions://FILE.jsonl)."""

    question_format: str | None = flag(
        None,
        "with questions://: how a line says its answer (default: the first format whose fields the first line has)",
        choices=QUESTION_FORMATS,
    )
    question_field: str | None = flag(
        None, "with questions://: the field of the question (default: as the format calls it)", metavar="NAME"
    )
    answer_field: str | None = flag(
        None, "with questions://: the field of the answer (default: as the format calls it)", metavar="NAME"
    )
    choices_field: str | None = flag(
        None, "with questions://: the field of what to choose from (default: as the format calls it)", metavar="NAME"
    )
    question_template: str = flag(
        f"Question: {PLACE}\nAnswer:", f"with questions://: a prompt, with {PLACE} where the question stands"
    )

    def validate(self) -> None:
        """
        Raises:
            UserError: a template without a place for the question.
        """
        if PLACE not in self.question_template:
            raise UserError(
                f"--question-template {self.question_template!r}: write {PLACE} where the question is to stand"
            )
