"""Conversations as a model was taught to read them: the ``chat_template`` of a Hugging Face tokenizer, in Jinja."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError, require
from megaforge.json_text import parse_json


class ChatTemplate:
    """Renders messages and encodes what comes out. Control tokens come from the template alone: the same characters
    inside a message stay text."""

    def __init__(self, source: str, name: str, tokens: Mapping[str, str]) -> None:
        """
        Args:
            source: the template, as ``transformers`` reads it.
            name: what messages call it.
            tokens: ``bos_token``, ``eos_token`` and others that it may use.

        Raises:
            UserError: Jinja is missing, or the template is wrong.
        """
        sandbox = require("jinja2.sandbox", extra="data", purpose=f"--chat-template {name}")
        self._errors = require("jinja2", extra="data", purpose=f"--chat-template {name}").TemplateError
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = self._raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.name, self.tokens = name, dict(tokens)
        try:
            self._template = environment.from_string(source)
        except (self._errors, SyntaxError, RecursionError, OverflowError) as error:  # Jinja compiles it to Python
            raise UserError(f"--chat-template {name}: not a Jinja template ({error})") from error

    def _raise(self, message: str) -> None:
        raise self._errors(message)

    def render(self, messages: Sequence[Mapping[str, Any]], *, asks: bool = True) -> str:
        """The conversation as text, up to where the answer begins; without ``asks`` up to the end of the last message.

        Raises:
            UserError: the template refuses these messages.
        """
        try:
            return str(self._template.render(messages=list(messages), add_generation_prompt=asks, **self.tokens))
        except Exception as error:  # a template is a program: it may divide by zero, call itself without end
            raise UserError(f"--chat-template {self.name}: cannot render these messages ({error})") from error

    def encode(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, asks: bool = True) -> list[int]:
        """The token ids of :meth:`render`, whose control tokens become their ids."""
        controls: Mapping[str, int] = tokenizer.control_tokens
        if not controls:
            return tokenizer.encode(self.render(messages, asks=asks))
        literals = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))
        written = json.dumps(list(messages), ensure_ascii=False)
        # A character that nobody wrote keeps a message's own "<|end|>" apart from the template's until it is encoded.
        guard = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in written)
        guarded = _mapped(list(messages), lambda text: literals.sub(lambda m: m[0][0] + guard + m[0][1:], text))
        ids: list[int] = []
        text, end = self.render(guarded, asks=asks), 0
        for found in [*literals.finditer(text), None]:
            piece = text[end : len(text) if found is None else found.start()].replace(guard, "")
            if piece:
                ids += tokenizer.encode(piece)
            if found is not None:
                ids.append(controls[found[0]])
                end = found.end()
        return ids


def load_chat_template(file: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The template in ``file`` (Jinja, or a ``tokenizer_config.json`` that has one), or the tokenizer's own: in its
    directory, in ``chat_template.jinja`` or ``tokenizer_config.json``.

    Raises:
        UserError: there is none.
    """
    place = Path(tokenizer.model_path)
    directory = place if place.is_dir() else place.parent
    config = _read_config(directory / "tokenizer_config.json", must=False)
    path = Path(file) if file else directory / "chat_template.jinja"
    if file and path.suffix == ".json":
        config = _read_config(path, must=True)
    elif file or path.is_file():
        return ChatTemplate(_read(path), str(path), _tokens(config))
    else:
        path = directory / "tokenizer_config.json"
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default", next(iter(named.values()), None))
    if not isinstance(source, str):
        raise UserError(f"--chat-template: {path} has no chat_template; name a file with one: --chat-template FILE")
    return ChatTemplate(source, str(path), _tokens(config))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path}: cannot be read ({error})") from error


def _read_config(path: Path, must: bool) -> dict[str, Any]:
    if not must and not path.is_file():
        return {}
    try:
        config = parse_json(_read(path))
    except ValueError as error:
        raise UserError(f"--chat-template {path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"--chat-template {path}: not a tokenizer_config.json")
    return config


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like, which are strings or objects with a ``content``."""
    found = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _mapped(value: Any, change: Any) -> Any:
    """``value`` with every string in it changed, keys and roles excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key == "role" else _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """As ``transformers`` has it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
