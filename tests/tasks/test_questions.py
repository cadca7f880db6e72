"""Questions of files as people publish them: what is asked, what is right, and which lines are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaforge.config.question_config import QuestionConfig
from megaforge.errors import UserError
from megaforge.tasks.questions import Question, read_questions

GSM8K = {
    "question": "Natalia sold 48 clips in April, and half as many in May. How many in all?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
}
MATH = {"problem": "What is $1/2 + 1$?", "level": "Level 1", "solution": r"It is $\boxed{\frac{3}{2}}$."}
HELLASWAG = {"ctx": "A man sits down. He", "endings": ["flies.", "eats."], "label": "1"}
LOGIQA = {"context": "All a are b.", "query": "Is c b?", "options": ["yes", "no", "perhaps"], "correct_option": 2}
MMLU = {"question": "2+2?", "choices": ["3", "4"], "answer": 1}
ARC = {"question": "Which?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}


def read(folder: Path, *rows: Any, **flags: Any) -> list[Question]:
    file = folder / "q.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return read_questions(str(file), QuestionConfig(**flags))


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "worked"),
    [
        (GSM8K, f"Question: {GSM8K['question']}\nAnswer:", "72", GSM8K["answer"]),
        ({"question": "2+2?", "answer": 4}, "Question: 2+2?\nAnswer:", "4", "4"),
        ({"prompt": "2+2?", "answer": "4"}, "Question: 2+2?\nAnswer:", "4", "4"),
        (MATH, "Question: What is $1/2 + 1$?\nAnswer:", r"\frac{3}{2}", MATH["solution"]),
        (HELLASWAG, "Question: A man sits down. He\nA. flies.\nB. eats.\nAnswer:", "B", ""),
        (LOGIQA, "Question: All a are b.\nIs c b?\nA. yes\nB. no\nC. perhaps\nAnswer:", "C", ""),
        (MMLU, "Question: 2+2?\nA. 3\nB. 4\nAnswer:", "B", ""),
        (ARC, "Question: Which?\nA. x\nB. y\nC. z\nAnswer:", "C", ""),
    ],
)
def test_forms_that_people_publish(row: Any, prompt: str, answer: str, worked: str, tmp_path: Path) -> None:
    [one] = read(tmp_path, "", row, " ")
    assert (one.prompt, one.answer, one.worked) == (prompt, answer, worked)
    assert one.learnt == (worked or answer) and one.place.endswith("q.jsonl: line 2")


def test_fields_and_prompts_of_ones_own(tmp_path: Path) -> None:
    row = {"frage": "{question}?", "antwort": "so #### 1", "question": "other", "answer": "2"}
    flags = {"question_field": "frage", "answer_field": "antwort", "question_template": "Q {question} A"}
    [one] = read(tmp_path, row, **flags)
    assert (one.prompt, one.answer) == ("Q {question}? A", "1")
    [one] = read(tmp_path, {**MMLU, "wahl": ["a", "b", "c"]}, choices_field="wahl")
    assert one.choices == ("a", "b", "c")
    [one] = read(tmp_path, {**MATH, "question": "q", "answer": "a"}, question_format="worked")
    assert one.answer == "a"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((), "holds no question"),
        ((GSM8K, "{"), "line 2 is not JSON"),
        ((GSM8K, "[1]"), "line 2: give an object"),
        (({"text": "a"},), r"line 1: no form of questions has these fields \(there are 'text'\)"),
        ((GSM8K, MATH), r"line 2: it has the fields .* and needs question \(question or prompt\)"),
        ((GSM8K, {"question": "q", "answer": "18 ####"}), "line 2: nothing stands behind ####"),
        (({"question": "", "answer": "1"},), "line 1: its question is empty"),
        (({"question": "q", "answer": None},), "line 1: its answer is empty or no text"),
        (('{"question": "\\ud800", "answer": "1"}',), "half a character"),
        (({"problem": "p", "solution": "no box"},), "line 1: its solution has no"),
        (({**HELLASWAG, "label": ""},), "'' is not one of its 2 choices"),
        (({**HELLASWAG, "label": "2"},), "'2' is not one of its 2 choices"),
        (({**MMLU, "answer": -1},), "-1 is not one of its 2 choices"),
        (({**MMLU, "answer": True},), "True is not one"),
        (({**MMLU, "choices": ["3"]},), "it has 1 choices"),
        (({**MMLU, "choices": ["3", ""]},), "its choices are no list of texts"),
    ],
)
def test_a_bad_line_is_named(rows: tuple[Any, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, *rows)


def test_bad_files_and_flags_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no field 'gold'"):
        read(tmp_path, GSM8K, answer_field="gold")
    with pytest.raises(UserError, match="no form of questions has these fields"):
        read(tmp_path, {"wahl": ["a", "b"], "query": "q"}, choices_field="wahl")
    with pytest.raises(UserError, match=r"questions://.*none\.jsonl: it cannot be read"):
        read_questions(str(tmp_path / "none.jsonl"), QuestionConfig())
    (tmp_path / "latin").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(UserError, match="byte 14 is not UTF-8"):
        read_questions(str(tmp_path / "latin"), QuestionConfig())
    with pytest.raises(UserError, match=r"write \{question\} where"):
        QuestionConfig(question_template="Q:").validate()
