"""Flags of tools that ask about texts: new ones of a task in chunks, or one of the user's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaforge.config.arguments import integer, part_of
from megaforge.errors import UserError
from megaforge.registry import CHUNKED_TASKS

if TYPE_CHECKING:
    from megaforge.data.tokenizer import Tokenizer


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """``--task``, ``--chunks`` and ``--examples``, or ``--input`` and ``--question``."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", type=part_of(CHUNKED_TASKS), metavar="NAME", help="texts of this task in chunks")
    what.add_argument("--input", metavar="FILE", help="a text; see --question")
    parser.add_argument(
        "--question", action="append", default=[], metavar="TEXT", help="of --input; may be given again"
    )
    parser.add_argument(
        "--chunks", nargs="+", type=integer(1), metavar="N", help="of a text of --task (default: as in training)"
    )
    parser.add_argument("--examples", type=integer(1), help="texts of each length of --task (default: 100)")


def check_text_flags(flags: argparse.Namespace, of_task: Sequence[str] = (), of_input: Sequence[str] = ()) -> None:
    """
    Args:
        of_task, of_input: further flags that are read with that one alone, by their attributes; None: not given.

    Raises:
        UserError: a flag is given that is not read, or a text and no question.
    """
    if flags.input:
        wanted, unread = "task", ("chunks", "examples", *of_task)
    else:
        wanted, unread = "input", ("question", *of_input)
    for name in unread:
        value = getattr(flags, name)
        if value is not None and value != []:
            flag, other = name.replace("_", "-"), "task" if wanted == "input" else "input"
            raise UserError(f"--{flag} {value}: it is read with --{wanted}, not with --{other}; leave it out")
    if flags.input and not flags.question:
        raise UserError(f"--input {flags.input}: nothing is asked; add --question TEXT")


def read_input(path: str, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
    """The text of ``--input``, and its tokens.

    Raises:
        UserError: it cannot be read as text, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path}: it cannot be read as text ({error})") from error
    tokens = tuple(tokenizer.encode(text))
    if not tokens:
        raise UserError(f"--input {path}: it is empty")
    return text, tokens
