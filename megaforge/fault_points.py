"""Named places of a run's code at which a test bed may let something go wrong.

A run without a plan of faults (:mod:`megaforge.resilience.faults`) passes them at the cost of one comparison.

| point | where | told |
|---|---|---|
| ``load`` | a checkpoint was found whole, and is about to be read | ``path`` |
| ``step`` | a batch is there, the step is about to begin | ``iteration``, ``model`` |
| ``gradients`` | the gradients are summed, the update is to come | ``iteration``, ``model`` |
| ``write`` | a rank is about to write one more tensor of its file | ``iteration`` |
| ``rename`` | every file is written, and the directory is about to become a checkpoint | ``iteration`` |
| ``latest`` | it is one, and ``latest`` is about to say so | ``iteration`` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

POINTS = ("load", "step", "gradients", "write", "rename", "latest")

_handler: Callable[[str, dict[str, Any]], None] | None = None


def reach(point: str, **where: Any) -> None:
    """This rank is at ``point``, one of :data:`POINTS`; what ``where`` says depends on it."""
    if _handler is not None:
        _handler(point, where)


def arm(handler: Callable[[str, dict[str, Any]], None] | None) -> None:
    """From now on ``handler`` is told of every point that this process reaches; None: nobody is."""
    global _handler
    _handler = handler


def armed() -> bool:
    """Whether anybody is told."""
    return _handler is not None
