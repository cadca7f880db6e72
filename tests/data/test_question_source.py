"""Questions as data: what of a sample is learnt, whoever reads it; numbers that stand for answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megaforge.config.config import Config
from megaforge.data.question_source import QUESTIONS, QuestionNumbers, questions_of
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from tests.data.test_chat_template import tokenizer
from tests.training.tiny import make_config

__all__ = ["tokenizer"]
ROWS = [{"question": f"{n}+1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(7)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return f"questions://{path}"


def config(file: str, *flags: str) -> Config:
    return make_config(["--data-path", file, "--vocab-size", "512", "--seq-length", "64", *flags])


def test_answers_alone_are_learnt(file: str, tokenizer: Tokenizer) -> None:
    source = QUESTIONS.open(config(file, "--valid-data-path", file), tokenizer)
    [notice] = source.notices
    assert notice.startswith(f"{file}: 7 questions in ")
    found = []
    for view, count in ((source, int(notice.split()[4])), (source.validation(), int(notice.split()[4]))):
        for k in range(count):
            tokens, marks, counts = np.empty(65, np.int64), np.zeros(65, np.bool_), np.ones(64, np.float32)
            view.fill(k, tokens, marks)
            view.weigh(k, counts)
            bounds = [*np.flatnonzero(marks), 65]
            for begin, end in zip(bounds, bounds[1:], strict=False):
                taught = [place for place in range(max(begin, 1), end) if counts[place - 1]]
                if taught:
                    learnt = slice(taught[0], taught[-1] + 1)
                    assert len(taught) == taught[-1] + 1 - taught[0]
                    text = tokenizer.decode(tokens[begin : taught[0]].tolist())
                    found.append((text, tokenizer.decode(tokens[learnt].tolist())))
    expected = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in ROWS]
    end = "" if tokenizer.eod is None else tokenizer.decode([tokenizer.eod])
    assert sorted(found) == sorted([(asked, said + end) for asked, said in expected] * 2)


def test_numbers_stand_for_questions_in_the_order_of_a_pass(file: str, tokenizer: Tokenizer) -> None:
    order = questions_of(config(file))
    passes = [[order.of(epoch * 7 + k).prompt for k in range(7)] for epoch in range(3)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes) and passes[0] != passes[1]
    assert [order.of(k).prompt for k in range(7)] == passes[0], "any order of asking"
    other = questions_of(config(file, "--seed", "7"))
    assert [other.of(k).prompt for k in range(7)] != passes[0]


def test_samples_that_stand_for_answers_teach_nothing(file: str, tokenizer: Tokenizer) -> None:
    source = QuestionNumbers(config(file, "--valid-data-path", file), tokenizer)
    tokens, marks, counts = np.ones(65, np.int64), np.ones(65, np.bool_), np.ones(64, np.float32)
    assert source.fill(3, tokens, marks) == 64 == source.sequence_length(3)
    source.weigh(3, counts)
    assert not (tokens.any() or marks.any() or counts.any())
    assert source.state(0) == source.state(9) and source.tokens_before(2) == 128
    assert source.validation().fill(0, tokens, marks) and tokens.any()


def test_what_cannot_be_is_said(file: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text needs a tokenizer: add --tokenizer-model"):
        QUESTIONS.check(config(file))
    with pytest.raises(UserError, match=r"none\.jsonl: it cannot be read"):
        QUESTIONS.check(config("questions://none.jsonl", "--tokenizer-model", "t.json"))
    with pytest.raises(UserError, match="name questions to evaluate on: --valid-data-path questions://FILE"):
        QUESTIONS.open(config(file), tokenizer).validation()
    with pytest.raises(UserError, match=r"give questions://FILE\.jsonl, as --data-path is"):
        QUESTIONS.open(config(file, "--valid-data-path", "chat://x"), tokenizer).validation()
    with pytest.raises(UserError, match="there is no answer in it that --seq-length 8 has room for"):
        QUESTIONS.open(config(file, "--seq-length", "8"), tokenizer)
