"""The errors a user sees, and the one way to import an optional dependency."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake in a flag, a file or the environment that its reader can fix.

    The message stands alone: it names the flag or file, its value and what would work. Entry scripts print it
    without a traceback and exit with status 2 (see :func:`megaforge.config.cli.run_entry`).
    """


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
