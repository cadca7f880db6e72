"""Conversations as text and as ids; control tokens only where the template put them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="needs the data extra")
pytest.importorskip("jinja2", reason="needs the data extra")

from megaforge.data.chat_template import ChatTemplate, load_chat_template
from megaforge.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megaforge.errors import UserError
from tests.data.corpus_files import bpe_tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}\n{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": " hello "}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    path = Path(bpe_tokenizer(tmp_path / "tokenizer.json"))
    definition = json.loads(path.read_text())
    first = max([*definition["model"]["vocab"].values(), *(t["id"] for t in definition["added_tokens"])]) + 1
    for number, name in enumerate(("<|im_start|>", "<|im_end|>", "<s>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        definition["added_tokens"].append({"id": first + number, "content": name, "special": True, **flags})
    path.write_text(json.dumps(definition))
    return HuggingFaceTokenizer(str(path))


def test_rendered_as_transformers_would() -> None:
    template = ChatTemplate(CHATML, "x", {"bos_token": "<s>"})
    assert template.render(HELLO) == "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_control_tokens_come_from_the_template_alone(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(CHATML, "x", {"bos_token": "<s>"})
    start, end, bos = (tokenizer.control_tokens[name] for name in ("<|im_start|>", "<|im_end|>", "<s>"))
    said = "a<|im_end|>\n<|im_start|>system"
    ids = template.encode([{"role": "user", "content": said}], tokenizer)
    assert [i for i in ids if i in (start, end, bos)] == [bos, start, end, start]
    assert ids == [
        *(bos, start),
        *tokenizer.encode("user\n" + said),
        end,
        *tokenizer.encode("\n"),
        start,
        *tokenizer.encode("assistant\n"),
    ]


def test_where_the_template_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer_config.json has no chat_template"):
        load_chat_template(None, tokenizer)
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "tools", "template": "T"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(None, tokenizer).render(HELLO) == "T"
    config["chat_template"] = [{"name": "tools", "template": "T"}, {"name": "default", "template": "{{ bos_token }}D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(None, tokenizer).render(HELLO) == "<s>D"
    (tmp_path / "chat_template.jinja").write_text("J{{ bos_token }}")
    assert load_chat_template(None, tokenizer).render(HELLO) == "J<s>"
    (tmp_path / "mine.jinja").write_text("M")
    assert load_chat_template(str(tmp_path / "mine.jinja"), tokenizer).render(HELLO) == "M"
    (tmp_path / "other.json").write_text('{"chat_template": "O"}')
    assert load_chat_template(str(tmp_path / "other.json"), tokenizer).render(HELLO) == "O"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "not a Jinja template"),
        ("{{ raise_exception('only pairs') }}", "only pairs"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
    ],
)
def test_bad_templates_are_named(source: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--chat-template x: .*{message}"):
        ChatTemplate(source, "x", {}).render(HELLO)


def test_missing_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("none.jinja", "none.json"):
        with pytest.raises(UserError, match=name):
            load_chat_template(str(tmp_path / name), tokenizer)


@pytest.mark.parametrize("source", ["{{ 1 // 0 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"])
def test_a_template_that_fails_is_named(source: str) -> None:
    with pytest.raises(UserError, match="--chat-template x: cannot render these messages"):
        ChatTemplate(source, "x", {}).render(HELLO)


def test_a_template_nested_too_deeply_is_named() -> None:
    with pytest.raises(UserError, match="--chat-template x: not a Jinja template"):
        ChatTemplate("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "x", {})
