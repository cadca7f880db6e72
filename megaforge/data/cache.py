"""``--data-cache-dir``: copies on a fast disk of what lies on a slow or a distant one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megaforge.config.run_config import DataConfig
from megaforge.data.indexed_dataset import IndexedDataset, bin_path, idx_path, sidecar_path
from megaforge.data.sidecar import content_digest
from megaforge.durable import give_name
from megaforge.errors import UserError

_OURS = (".lock", ".part", ".mark")  # suffixes of what is not a copy


class Cache:
    """One copy a machine of each file, whichever rank asks first; those used longest ago go when it is full.

    Args:
        directory: where.
        limit: bytes of copies to keep; what this process has asked for of datasets is kept in any case.
    """

    def __init__(self, directory: str, limit: int) -> None:
        self.directory, self.limit = Path(directory), limit
        self._kept: set[Path] = set()

    @classmethod
    def of(cls, data: DataConfig) -> Cache | None:
        """What the flags ask for."""
        return None if data.data_cache_dir is None else cls(data.data_cache_dir, data.data_cache_bytes)

    def made(self, name: str, make: Callable[[Path], object], keep: bool = False) -> Path:
        """The file ``name``, made by ``make(path)`` where it is not there: by one process, while the others wait.

        Raises:
            UserError: it cannot be written.
        """
        target = self.directory / name
        if keep:
            self._kept.add(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with alone(Path(f"{target}.lock")):
                if not target.exists():
                    make(target)
                    self._make_room(target)
            os.utime(target)
        except OSError as error:
            raise UserError(
                f"--data-cache-dir {self.directory}: {name} cannot be copied there ({error.strerror or error})"
            ) from error
        return target

    def _make_room(self, newest: Path) -> None:
        """Deletes the copies used longest ago while there is too much; files that are open live on until closed."""
        files = [path for path in self.directory.rglob("*") if path.suffix not in _OURS and path.is_file()]
        used = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in files)
        excess = sum(size for _, size, _ in used) - self.limit
        for _, size, path in used:
            if excess > 0 and path not in {newest, *self._kept}:
                path.unlink(missing_ok=True)
                excess -= size


def cached_dataset(prefix: str, cache: Cache | None) -> str:
    """The prefix of a copy of the dataset ``prefix``, named by its content; ``prefix`` itself without a cache.

    Raises:
        UserError: it is larger than the cache may be, or cannot be copied.
    """
    if cache is None:
        return prefix
    files = [path(prefix) for path in (bin_path, idx_path, sidecar_path) if path(prefix).is_file()]
    size = sum(file.stat().st_size for file in files)
    if size > cache.limit:
        raise UserError(
            f"--data-cache-size {cache.limit / 1e9:g}: {prefix} has {size / 1e9:.3g} GB; allow as many, or leave out "
            "--data-cache-dir"
        )
    name = f"{content_digest(IndexedDataset(prefix), None)[:32]}/{Path(prefix).name}"
    for file in files:
        cache.made(f"{name}{file.suffix}", partial(_copy, file), keep=True)
    return str(cache.directory / name)


def _copy(file: Path, target: Path) -> None:
    part = Path(f"{target}.part")
    shutil.copyfile(file, part)
    give_name(part, target)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Waits until no other process is between here and the block's end."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
