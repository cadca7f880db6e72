"""Tools that answer a model while it writes: where it writes ``<<48/2=`` the calculator goes on with ``24>>``.

A tool is a row of :data:`megaforge.registry.TOOLS`; a file of ``--extensions`` or an entry point of the group
``megaforge.tools`` adds others. What a tool has written stands in the text as the model's own tokens do, and the model
goes on behind it; but they are not the model's (:attr:`megaforge.inference.generation.Continuations.inserted`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megaforge.errors import UserError
from megaforge.registry import TOOLS, load_extensions

if TYPE_CHECKING:
    from megaforge.config.config import Config
    from megaforge.data.tokenizer import Tokenizer
    from megaforge.inference.generation import Continuations
    from megaforge.inference.staged import StagedModel


class Tool(Protocol):
    """
    Attributes:
        opens: the text with which a request begins.
        closes: the text behind a request, which calls the tool.
    """

    opens: str
    closes: str

    def __call__(self, request: str) -> str:
        """What is written behind ``closes``. All ranks that share the model make the same calls.

        An error is a text, too: the model may read it.
        """


@dataclass(frozen=True)
class ToolSetting:
    """What tools are made of. One that needs some of it has a class method ``of(setting)``.

    Attributes:
        memory: the FILE of ``--memory``.
    """

    model: StagedModel
    config: Config
    tokenizer: Tokenizer
    memory: str | None = None


@dataclass
class ToolCalls:
    """The tools of a command.

    Attributes:
        calls: how many requests were answered.
        missed: requests that were not: the token that closed one went on behind it.
    """

    tools: Sequence[Tool]
    tokenizer: Tokenizer
    calls: int = 0
    missed: int = 0

    @classmethod
    def of(cls, names: Sequence[str], setting: ToolSetting) -> ToolCalls:
        """
        Raises:
            UserError: no tool has one of the names, or one cannot be made.
        """
        parts = [TOOLS.get(name) for name in names]
        return cls([part.of(setting) if hasattr(part, "of") else part for part in parts], setting.tokenizer)

    def line(self) -> str:
        """What to say at the end."""
        missed = f"; {self.missed} were not, for the token that closed them went on" if self.missed else ""
        return f"--tools: {self.calls} requests were answered{missed}"


class Watch:
    """One text while it is written."""

    def __init__(self, owner: ToolCalls) -> None:
        self._owner = owner
        self._seen = self._begin = 0  # characters that were looked at, and from which on requests may begin

    def passed(self, text: str) -> None:
        """``text`` ends with what a tool has written: nothing in it is a request."""
        self._seen = self._begin = len(text)

    def answer(self, text: str) -> list[int]:
        """The tokens that a tool puts behind ``text``, all that is written so far; none: nothing was asked for.

        The request that was opened last counts, and what closes it first: that must be the end of the text.
        """
        seen, self._seen = self._seen, len(text)
        found: list[tuple[int, int, Tool, int]] = []
        for tool in self._owner.tools:
            first = text.rfind(tool.opens, self._begin)
            if first >= 0:
                begin = first + len(tool.opens)
                end = text.find(tool.closes, begin)
                if end >= 0 and end + len(tool.closes) > seen:
                    found.append((first, begin, tool, end))
        if not found:
            return []
        _, begin, tool, end = max(found, key=lambda one: (*one[:2], -one[3]))
        self._begin = begin
        if end + len(tool.closes) < len(text):
            self._owner.missed += 1
            return []
        self._owner.calls += 1
        return _behind(self._owner.tokenizer, tool.closes, tool(text[begin:end]))


class Insertions:
    """What tools write into texts that go on together."""

    def __init__(self, owner: ToolCalls) -> None:
        self._owner, self._watches = owner, dict[int, Watch]()

    def answer(self, batch: Continuations, texts: Mapping[int, str]) -> None:
        """Answers requests; ``texts``: what is written of each text that goes on, by its number."""
        for number, text in texts.items():
            watch = self._watches.setdefault(number, Watch(self._owner))
            if number in batch.inserted:
                watch.passed(text)
            else:
                batch.insert(number, watch.answer(text))


def _behind(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """The tokens of ``text`` where ``before`` stands in front of it: some tokenizers begin every text with a space."""
    first, whole = tokenizer.encode(before), tokenizer.encode(before + text)
    return whole[len(first) :] if whole[: len(first)] == first else tokenizer.encode(text)


def add_tool_flags(parser: argparse.ArgumentParser) -> None:
    """``--tools`` and what they read."""
    group = parser.add_argument_group("tools")
    group.add_argument(
        "--tools",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"what answers the model while it writes: {', '.join(TOOLS.builtin)}",
    )
    group.add_argument(
        "--memory", metavar="FILE", help="with --tools retrieval: what tools/agent.py --memory has written"
    )
    group.add_argument(
        "--extensions", nargs="+", default=[], metavar="FILE", help="files that register tools or metrics of your own"
    )


def check_tool_flags(flags: argparse.Namespace) -> None:
    """Loads ``--extensions``, and looks at the tools.

    Raises:
        UserError: no tool has one of the names, or one is named twice; or a memory without the tool that looks it up,
            or the other way round.
    """
    _ = load_extensions(tuple(flags.extensions))
    shown = f"--tools {' '.join(flags.tools)}"
    for name in flags.tools:
        try:
            TOOLS.check(name)
        except UserError as error:
            raise UserError(f"{shown}: {error}") from error
    if len(set(flags.tools)) < len(flags.tools):
        raise UserError(f"{shown}: name each tool once")
    if ("retrieval" in flags.tools) != (flags.memory is not None):
        said = (
            f"{shown}: add --memory FILE" if flags.memory is None else f"--memory {flags.memory}: add --tools retrieval"
        )
        raise UserError(f"{said}; retrieval looks up what tools/agent.py --memory FILE has written")
