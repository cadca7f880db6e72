"""What to go on from: prompts of the command line, of a file or of standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.data.chat_template import ChatTemplate
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.json_text import parse_json

_KEYS = ("prompt", "text")


@dataclass(frozen=True)
class Prompt:
    """A text, or the messages of a conversation (then ``text`` is its last).

    Attributes:
        place: what errors call it.
        text: what to go on from.
        messages: ``{"role": ..., "content": ...}`` each; None for a plain text.
    """

    place: str
    text: str
    messages: tuple[dict[str, Any], ...] | None = None

    def encode(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
        """Its token ids; with a ``template`` a plain text is what the user says.

        Raises:
            UserError: there are none, or messages have no template.
        """
        if template is not None:
            ids = template.encode(self.messages or ({"role": "user", "content": self.text},), tokenizer)
        elif self.messages is not None:
            raise UserError(f"{self.place} holds messages; add --chat-template")
        else:
            ids = tokenizer.encode(self.text)
        if not ids:
            raise UserError(f"{self.place} is empty: the model needs at least one token to go on from")
        return ids

    def record(self) -> dict[str, Any]:
        """The prompt as it stands in the output."""
        return {"prompt": self.text} if self.messages is None else {"messages": list(self.messages)}


def read_prompts(file: str, json_lines: bool) -> list[Prompt]:
    """The prompts of ``file`` (``-``: standard input), one a line; empty lines are none.

    Args:
        json_lines: each line is an object with ``prompt``, ``text`` or ``messages``; else it is the prompt itself.

    Raises:
        UserError: the file cannot be read, holds none, or a line is something else.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--prompt-file {file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {file}: byte {error.start} is not UTF-8") from error
    prompts = [
        _of_line(f"--prompt-file {file}: line {number}", line.rstrip("\r"), json_lines)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise UserError(f"--prompt-file {file}: holds no prompt")
    return prompts


def _of_line(place: str, line: str, json_lines: bool) -> Prompt:
    if not json_lines:
        return Prompt(place, line)
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error})") from error
    record = record if isinstance(record, dict) else {}
    messages: Any = record.get("messages")
    if _are_messages(messages):
        return Prompt(place, str(messages[-1]["content"]), tuple(messages))
    text = next((record[key] for key in _KEYS if isinstance(record.get(key), str)), None)
    if text is None or messages is not None:
        raise UserError(
            f'{place} is not a prompt; give {{"prompt": "..."}} or {{"messages": [{{"role": "user", "content": '
            '"..."}]}'
        )
    return Prompt(place, text)


def _are_messages(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return False
    return all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
