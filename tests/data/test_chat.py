"""Conversations as training data: what is learnt of them, how they are packed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megaforge.data.chat import Conversation, Packed, Reader, pack
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from tests.data.test_chat_template import CHATML, tokenizer
from tests.training.tiny import make_config

__all__ = ["tokenizer"]
DATA = ("--data-path", "chat://x.jsonl", "--vocab-size", "512")


@pytest.fixture
def reader(tokenizer: Tokenizer, tmp_path: Path) -> Reader:
    (tmp_path / "t.jinja").write_text(CHATML.replace("{{ bos_token }}", ""))
    return Reader(make_config([*DATA, "--chat-template", str(tmp_path / "t.jinja")]), tokenizer)


def test_answers_alone_are_learnt(reader: Reader, tokenizer: Tokenizer) -> None:
    said = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")]
    rows = [{"role": role, "content": text} for role, text in said]
    ids, learnt = reader.encode(json.dumps({"messages": rows}), "x")
    taught = [token for token, own in zip(ids, learnt, strict=True) if own]
    end = tokenizer.control_tokens["<|im_end|>"]
    newline = tokenizer.encode("\n")
    expected = [*tokenizer.encode("hello"), end, *newline, *tokenizer.encode("so long"), end, *newline]
    assert taught == [*expected, *([] if tokenizer.eod is None else [tokenizer.eod])]


def test_a_prompt_and_its_response(tokenizer: Tokenizer) -> None:
    for more in (), ("--train-on-prompts",):
        reader = Reader(make_config([*DATA, *more]), tokenizer)
        found = reader.encode(json.dumps({"prompt": "one", "response": " two"}), "x")
        prompt, response = tokenizer.encode("one"), tokenizer.encode(" two")
        assert found.ids[: len(prompt) + len(response)] == [*prompt, *response]
        assert found.learnt[: len(prompt)] == [bool(more)] * len(prompt) and all(found.learnt[len(prompt) :])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "x: line 3 is not JSON"),
        ('{"prompt": "a"}', 'x: line 3: give {"prompt"'),
        ('{"messages": [{"content": "a"}]}', "message 1 has no role"),
        ('{"messages": []}', "no message has the role assistant"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message has the role assistant"),
    ],
)
def test_bad_lines_are_named(reader: Reader, line: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("{", r"\{")):
        reader.encode(line, "x: line 3")


def test_a_template_that_renders_answers_otherwise_later_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(text)
    reader = Reader(make_config([*DATA, "--chat-template", str(tmp_path / "t.jinja")]), tokenizer)
    rows = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(UserError, match="renders an answer otherwise once more follows"):
        reader.encode(json.dumps({"messages": rows}), "x")


@pytest.mark.parametrize("lengths", [[], [5], [10] * 3, [7, 3, 3, 4, 6, 1, 9, 10, 2, 5]])
def test_each_item_is_packed_once_and_fits(lengths: list[int]) -> None:
    bins = pack(lengths, 10)
    assert sorted(item for own in bins for item in own) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in own) <= 10 for own in bins)
    assert len(bins) <= (1 if not lengths else 2 * -(-sum(lengths) // 10))


def test_sequences_hold_documents_and_count_answers() -> None:
    rows = [
        Conversation([1, 2, 3, 4], [False, False, True, True]),
        Conversation([5, 6], [False, True]),
        Conversation(list(range(10, 22)), [False] * 3 + [True] * 9),  # longer than 7 + 1
        Conversation(list(range(30, 42)), [False] * 10 + [True] * 2),  # nothing left of its answer
    ]
    packed = Packed(rows, 7)
    assert (packed.cut, packed.lost, len(packed)) == (2, 1, 2)
    assert "2 are longer" in packed.describe("f") and "1 of which no answer" in packed.describe("f")
    tokens, marks, counts = np.empty(9, np.int64), np.zeros(9, np.bool_), np.ones(8, np.float32)
    assert packed.fill(0, tokens, marks) == 7
    assert tokens.tolist() == [*range(10, 18), 0] and marks.tolist() == [True] + [False] * 7 + [True]
    packed.weigh(0, counts)
    assert counts.tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    tokens, marks, counts = np.empty(9, np.int64), np.zeros(9, np.bool_), np.ones(8, np.float32)
    packed.fill(1, tokens, marks)
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 0] and np.flatnonzero(marks).tolist() == [0, 4, 6]
    packed.weigh(1, counts)
    assert counts.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    counts[:] = 1
    packed.weigh(2, counts)  # past the end, so that all ranks end together
    assert not counts.any()
