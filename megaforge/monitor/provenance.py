"""Which code runs, and on what."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import megaforge

_PACKAGES = ("torch", "numpy", "PyYAML", "triton", "cryptography", "tokenizers", "nvidia-nccl-cu13", "nvidia-nccl-cu12")


@functools.cache
def code_version() -> dict[str, Any]:
    """``version``; ``commit`` and whether tracked files differ from it (``dirty``), None where the code was installed
    without its repository, or git cannot say."""
    root = Path(megaforge.__file__).parents[1]
    known: dict[str, Any] = {"version": megaforge.__version__, "commit": None, "dirty": None}
    if not (root / ".git").exists():
        return known
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return known | {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def source_digest() -> str:
    """The SHA-256 of this package's files of Python, by their names and contents: of the code that runs, whether or not
    a commit has it."""
    package, found = Path(megaforge.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found.update(f"{content}  {path.relative_to(package).as_posix()}\n".encode())
    return found.hexdigest()


def environment() -> dict[str, Any]:
    """Versions of Python, of the packages that compute, and of the system."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": versions,
    }
