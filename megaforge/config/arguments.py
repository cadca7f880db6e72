"""The command line of a tool: argparse whose every complaint is the one line that entry scripts print."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from megaforge.config.fields import Bounds
from megaforge.errors import UserError
from megaforge.registry import Registry


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, uses the terminal's width up to 120 columns, and shows defaults: ``[8]``."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        super().__init__(prog, max_help_position=32, width=min(120, int(columns) if columns.isdigit() else 110))

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Lines of at most ``width`` columns; a flag's name is never cut at its hyphens."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help
        if text is None or default is None or default is False or default == [] or default is argparse.SUPPRESS:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} [{shown.replace('%', '%%')}]".strip()


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are :class:`UserError`; flags are written out in full."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Any complaint of argparse becomes the one line that entry scripts print."""
        # Of a number out of bounds: "--top-p 1.5: must be ...", as settings have it.
        message = re.sub(r"^argument (\S+): (?=\S+: (?:must|expected|too) )", r"\1 ", message)
        raise UserError(message.removeprefix("argument "))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuses what no flag can take. An empty text is mostly a shell variable that is not set; of ``--flag=--``
        argparse would take the value away and fail."""
        if action.option_strings and action.nargs != 0:
            flag = max(action.option_strings, key=len)
            if arg_strings == ["--"]:
                raise UserError(f"{flag} --: expected a value")
            if "" in arg_strings:
                raise UserError(f"{flag} '': the value is empty; give one, or leave the flag out")
            for text in arg_strings:
                # Bytes of the command line that Python could not decode. Text would go wrong later, in any library.
                if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
                    shown = text.encode(errors="backslashreplace").decode()
                    raise UserError(f"{flag} {shown}: holds bytes that are not UTF-8; write it, or rename it, in UTF-8")
        return super()._get_values(action, arg_strings)


def integer(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """What argparse's ``type`` takes for a whole number within bounds, both included."""
    return _within(Bounds(least, most), int, "an integer")


def number(
    least: float | None = None, most: float | None = None, *, above: float | None = None, below: float | None = None
) -> Callable[[str], float]:
    """What argparse's ``type`` takes for a number within bounds; ``above`` and ``below`` are left out themselves."""
    return _within(Bounds(least, most, above=above, below=below), float, "a number")


def part_of(registry: Registry) -> Callable[[str], str]:
    """What argparse's ``type`` takes for the name of a part of ``registry``."""

    def parse(text: str) -> str:
        try:
            registry.check(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return parse


def byte_size(text: str) -> int:
    """``5GB``, ``500M``, ``1000000``, in powers of 1000, as argparse's ``type``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", text.strip(), re.IGNORECASE)
    value = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if not value:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 5GB, 500MB or 1000000")
    return value


def _within(bounds: Bounds, kind: type, expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}") from None
        try:
            bounds.check(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from None
        return value

    return parse
