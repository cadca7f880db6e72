"""What goes wrong with a checkpoint."""

from __future__ import annotations

from megaforge.errors import UserError


class CheckpointError(UserError):
    """A checkpoint could not be written or read; every rank of the run raises it with the same text."""


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are not what was written: missing, truncated, altered, or never a checkpoint."""
