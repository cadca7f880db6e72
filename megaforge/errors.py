"""The errors a user sees, and the one way to import an optional dependency."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType


class UserError(Exception):
    """A mistake in a flag, a file or the environment that its reader can fix.

    The message stands alone: it names the flag or file, its value and what would work. Entry scripts print it
    without a traceback and exit with status 2 (see :func:`megaforge.config.cli.run_entry`).
    """


class UserErrors(UserError):
    """Several mistakes, told together."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n  ".join([f"{len(messages)} things are wrong:", *messages]))
        self.messages = tuple(messages)


@contextlib.contextmanager
def gathered(problems: list[str]) -> Iterator[None]:
    """What is refused inside is added to ``problems``, each text once, with its flag where it is there with one;
    :func:`raise_all` tells them."""
    try:
        yield
    except UserError as error:
        for message in error.messages if isinstance(error, UserErrors) else (str(error),):
            if not any(known.endswith(message) for known in problems):
                problems.append(message)


def raise_all(problems: Sequence[str]) -> None:
    """
    Raises:
        UserError: there are problems; with all of them.
    """
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserErrors(problems)


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports the optional ``module`` and returns it.

    Raises:
        UserError: it is not installed; the message names the ``extra`` of this package that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the Python package '{module}' ({error}); "
            f"install it with: pip install 'megaforge[{extra}]'"
        ) from error


class CheckpointError(UserError):
    """A checkpoint could not be written or read; every rank of the run raises it with the same text."""


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are not what was written: missing, truncated, altered, or never a checkpoint."""
