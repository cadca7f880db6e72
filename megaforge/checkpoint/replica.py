"""``--save-replica URL``: a second copy of every checkpoint, at any place that fsspec knows, and its way back.

An object store has no rename: a copy's ``manifest.json`` comes last, and a directory without one is not a checkpoint.
The files are the same bytes, encrypted where the checkpoint is; they are copied from the first copy once that is
published.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaforge.checkpoint.directory import commit_fetched, list_steps, step_name
from megaforge.checkpoint.find import check_file
from megaforge.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megaforge.errors import UserError, require
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d+)")


class Replica:
    """The copies below ``url``.

    Raises:
        UserError: there is no ``fsspec``, or it does not know such a URL.
    """

    def __init__(self, url: str) -> None:
        fsspec = require("fsspec", "replica", f"--save-replica {url}")
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"--save-replica {url}: {error}") from error

    def check(self) -> None:
        """Whether something can be written there.

        Raises:
            UserError: it cannot.
        """
        probe = f"{self._root}/.writable"
        try:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(probe, b"x")
            self._files.rm_file(probe)
        except Exception as error:  # of whatever package the place has
            raise UserError(f"--save-replica {self.url}: nothing can be written there ({_said(error)})") from error

    def copy(self, path: Path, ctx: ParallelContext) -> str | None:
        """Copies the published checkpoint ``path``, each file by one rank. Collective.

        Returns:
            What went wrong, on every rank; what was copied is then no checkpoint.
        """
        names = sorted(file.name for file in path.iterdir() if file.name != MANIFEST_FILE)
        rank, size = (0, 1) if ctx.control is None else (ctx.world.rank, ctx.world.size)
        problem = self._put(path, names[rank::size])
        problem = next(filter(None, exchange(ctx, problem)), None)
        if problem is None and rank == 0:
            problem = self._put(path, [MANIFEST_FILE])
        return next(filter(None, exchange(ctx, problem)), None)

    def _put(self, path: Path, names: Iterable[str]) -> str | None:
        try:
            self._files.makedirs(f"{self._root}/{path.name}", exist_ok=True)
            for name in names:
                self._files.put_file(str(path / name), f"{self._root}/{path.name}/{name}")
        except Exception as error:  # of whatever package the place has
            return _said(error)
        return None

    def remove(self, names: Iterable[str]) -> None:
        """Deletes copies; what cannot be deleted is said and stays."""
        for name in names:
            try:
                copied = f"{self._root}/{name}"
                if self._files.exists(copied):
                    if self._files.exists(f"{copied}/{MANIFEST_FILE}"):
                        self._files.rm_file(f"{copied}/{MANIFEST_FILE}")  # first: half of it is not a checkpoint
                    self._files.rm(copied, recursive=True)
            except Exception as error:  # of whatever package the place has
                logger.warning("--save-replica %s: %s could not be removed: %s", self.url, name, _said(error))

    def steps(self) -> list[int]:
        """Iterations of the whole copies, newest first.

        Raises:
            UserError: the place cannot be read.
        """
        try:
            if not self._files.exists(self._root):
                return []
            names = [str(name).rstrip("/").rpartition("/")[2] for name in self._files.ls(self._root, detail=False)]
            found = [int(match[1]) for name in names if (match := _STEP.fullmatch(name))]
            whole = [step for step in found if self._files.exists(f"{self._root}/{step_name(step)}/{MANIFEST_FILE}")]
        except Exception as error:  # of whatever package the place has
            raise UserError(f"{self.url}: it cannot be read ({_said(error)})") from error
        return sorted(whole, reverse=True)

    def fetch(self, directory: Path, step: int | None = None) -> Path:
        """Brings a copy to ``directory``: the newest one, or that of ``step``; it is checked before it is a checkpoint.

        Raises:
            UserError: there is none, it is damaged, or it is there already.
        """
        steps = self.steps()
        if not steps or step not in (None, *steps):
            raise UserError(f"{self.url}: no copy of step {step or 'N'} there; it has {steps or 'none'}")
        step = steps[0] if step is None else step
        if directory.is_dir() and step in [there for there, _ in list_steps(directory)]:
            raise UserError(f"{directory}: step {step} is there already; name another directory")

        def fill(temporary: Path) -> None:
            source = f"{self._root}/{step_name(step)}"
            for name in self._files.ls(source, detail=False):
                file = str(name).rpartition("/")[2]
                self._files.get_file(f"{source}/{file}", str(temporary / file))
            manifest = read_manifest(temporary)
            checked = (check_file(temporary / name, record) for name, record in manifest.files.items())
            problem = next(filter(None, checked), None)
            if problem is not None:
                raise UserError(f"{self.url}: the copy of step {step} is damaged: {problem.text}")

        return commit_fetched(directory, step, fill)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def replica_of(url: str | None) -> Replica | None:
    """The replica that ``--save-replica`` names."""
    return None if url is None else Replica(url)


def copy_and_retain(replica: Replica, path: Path, removed: Iterable[Any], ctx: ParallelContext) -> str | None:
    """Copies ``path``, just published, and lets those copies go whose first copies went; a failure is a warning, as the
    run's own checkpoint is there. Collective.

    Returns:
        What went wrong.
    """
    problem = replica.copy(path, ctx)
    if ctx.is_first_rank and problem is not None:
        logger.warning("--save-replica %s: no copy of %s: %s", replica.url, path.name, problem)
    elif ctx.is_first_rank:
        replica.remove(Path(name).name for name in removed)
    return problem
