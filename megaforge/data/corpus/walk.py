"""The files of a directory tree, in an order that depends on nothing but their names; links are followed."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megaforge.data.left_out import LeftOut

DEFAULT_EXCLUDES = (
    *(".git", ".hg", ".svn", ".bzr", "__pycache__", ".venv", "venv", ".tox", ".nox", "node_modules"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", "*.egg-info", "*.dist-info"),
)


def walk(root: str, excludes: Sequence[str], left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """(path, name to show) of every file under ``root``: a directory's own files first, then its directories'.

    A link is followed where it leads out of the tree; one that leads into it would read the same files twice. A single
    file is its own tree. What is not read is named in ``left_out``.
    """
    if not os.path.isdir(root):
        yield root, shown(os.path.basename(root))
        return
    base = shown(os.path.basename(os.path.abspath(root)))
    tree = Path(os.path.realpath(root))
    seen = {str(tree)}
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        try:
            names = sorted(os.listdir(os.path.join(root, directory)))
        except OSError as error:
            left_out.add(f"{base}/{shown(directory)}", f"a directory that cannot be read ({error.strerror})")
            continue
        subdirectories = []
        for name in names:
            local = os.path.join(directory, name)
            path, label = os.path.join(root, local), f"{base}/{shown(local)}"
            reason = _excluded(local, excludes) or _unusable(path, tree, seen)
            if reason is not None:
                left_out.add(label, reason)
            elif os.path.isdir(path):
                subdirectories.append(local)
            else:
                yield path, label
        waiting += reversed(subdirectories)


def shown(name: str) -> str:
    """The name as text, whatever bytes the file system has for it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _excluded(relative: str, patterns: Sequence[str]) -> str | None:
    """The reason, if the path or its last component matches a pattern."""
    name = relative.rpartition("/")[2]
    for pattern in patterns:
        if fnmatch.fnmatchcase(relative, pattern) or fnmatch.fnmatchcase(name, pattern):
            return f"excluded by its name ({pattern})"
    return None


def _unusable(path: str, tree: Path, seen: set[str]) -> str | None:
    """Why a file or directory is not read, or None; ``seen`` gains the directories that links lead to."""
    if os.path.islink(path):
        target = Path(os.path.realpath(path))
        if not target.exists():
            return "a symbolic link to nothing"
        if target.is_relative_to(tree):
            return "a symbolic link into the same directory, which is read anyway"
        if target.is_dir() and tree.is_relative_to(target):
            return "a symbolic link to a directory that holds this one"
    if os.path.isdir(path):
        real = os.path.realpath(path)
        if real in seen:
            return "a directory that was read under another name"
        seen.add(real)
        return None
    return None if os.path.isfile(path) else "neither a file nor a directory"
