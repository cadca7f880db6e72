"""What a piece of code asks of the disk, in order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def disk_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What is synced and renamed below ``folder`` from now on, in order: ``("fsync", "a"), ("replace", "a", "b")``."""
    done: list[tuple[str, ...]] = []

    def noted(name: str, path_of: Callable[[Any], str]) -> None:
        real = getattr(os, name)

        def operation(*given: Any, **how: Any) -> Any:
            done.append((name, *(os.path.relpath(path_of(one), folder) for one in given)))
            return real(*given, **how)

        monkeypatch.setattr(os, name, operation)

    noted("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    noted("rename", os.fspath)
    noted("replace", os.fspath)
    return done
