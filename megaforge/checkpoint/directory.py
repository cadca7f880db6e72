"""The directory of a run's checkpoints: names, the commit, what is kept, what is set aside.

step_0000100/            a committed checkpoint
step_0000200.damaged/    one that did not verify, set aside so that its name is free again
step_0000400.abandoned/  one of later steps than those from which a run went on: no part of its line any more
.tmp_step_0000300/       one being written, or left by a run that was killed while writing
latest                   name of the newest commit: a hint; the newest directory that verifies is the truth

All ``step_N`` of a directory are one line of training, so the highest number is the newest. A run that goes back keeps
it so: before its first save it renames the later steps, which nothing deletes and nothing loads by itself.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megaforge.checkpoint.hashed_file import sync_all
from megaforge.checkpoint.manifest import Manifest, read_manifest, write_manifest
from megaforge.config.checkpoint_config import CheckpointConfig
from megaforge.durable import sync_path
from megaforge.errors import CheckpointError
from megaforge.fault_points import reach

logger = logging.getLogger(__name__)

LATEST_FILE = "latest"
_STEP = re.compile(r"step_(\d+)")
# A committed checkpoint that a second save of the same step has moved out of the way: valid until that one is in place.
_REPLACED = re.compile(r"\.replaced_step_(\d+)")
_ASIDE = re.compile(r"step_\d+\.(damaged|abandoned)(\.\d+)?")
_LEFTOVER = re.compile(r"\.(tmp|trash)_step_\d+")


def step_name(step: int) -> str:
    """Name of the checkpoint of iteration ``step``."""
    return f"step_{step:07d}"


def temporary_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is committed."""
    return directory / f".tmp_{step_name(step)}"


def is_step_directory(path: Path) -> bool:
    """Whether ``path`` is named like one checkpoint rather than a directory of checkpoints."""
    return bool(_STEP.fullmatch(path.name))


def list_steps(directory: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints (not verified), newest first."""
    found = []
    for path in directory.iterdir():
        match = _STEP.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), bool(_STEP.fullmatch(path.name)), path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def prepare_temporary(directory: Path, step: int) -> Path:
    """Removes what killed runs left in ``directory`` and makes an empty temporary checkpoint directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        replaced = _REPLACED.fullmatch(path.name)
        if _LEFTOVER.fullmatch(path.name) or (replaced and (directory / path.name.removeprefix(".replaced_")).is_dir()):
            shutil.rmtree(path)
    temporary = temporary_path(directory, step)
    temporary.mkdir()
    return temporary


def commit(directory: Path, manifest: Manifest) -> Path:
    """Turns the written temporary directory into a checkpoint: either it is there and whole, or it is not there.

    Raises:
        OSError: nothing has changed but the temporary directory.
    """
    temporary, final = temporary_path(directory, manifest.step), directory / step_name(manifest.step)
    hint, replaced = directory / f".{LATEST_FILE}", directory / f".replaced_{final.name}"
    try:
        hint.write_text(f"{final.name}\n")
        sync_all([*write_manifest(temporary, manifest), temporary, hint])
        reach("rename", iteration=manifest.step)
        _rename(temporary, final, replaced)
        reach("latest", iteration=manifest.step)
        try:
            os.replace(hint, directory / LATEST_FILE)
        except OSError as error:
            logger.warning("%s is committed, but the hint %s was not updated: %s", final, LATEST_FILE, error)
    finally:
        hint.unlink(missing_ok=True)
    sync_path(directory)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def _rename(temporary: Path, final: Path, replaced: Path) -> None:
    """One that has the name already steps aside, and comes back where the new one cannot take it."""
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise


def commit_fetched(directory: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Makes a checkpoint of ``step`` of the files that ``fill`` brings to the directory that it is given.

    Raises:
        OSError: it cannot be written.
    """
    temporary, final = prepare_temporary(directory, step), directory / step_name(step)
    try:
        fill(temporary)
        sync_all([*temporary.iterdir(), temporary])
        os.rename(temporary, final)
        sync_path(directory)
    finally:
        discard_temporary(directory, step)
    return final


def discard_temporary(directory: Path, step: int) -> None:
    """Removes a checkpoint that was not committed."""
    shutil.rmtree(temporary_path(directory, step), ignore_errors=True)


def quarantine(path: Path) -> Path | None:
    """Renames the damaged checkpoint ``path`` to ``NAME.damaged`` and returns that, or None on read-only media."""
    try:
        return _set_aside(path, "damaged")
    except OSError:
        return None


def abandon_later(directory: Path, step: int) -> list[Path]:
    """Sets aside the checkpoints of later steps than ``step``, from which a run is about to go on another way, as
    ``NAME.abandoned``; returns their new paths.

    Raises:
        OSError: one could not be renamed; those of still later steps have been.
    """
    return [_set_aside(path, "abandoned") for number, path in list_steps(directory) if number > step]


def _set_aside(path: Path, why: str) -> Path:
    """Renames a checkpoint to ``NAME.WHY`` (``NAME.WHY.1`` ... where that is taken): visible, but not a checkpoint."""
    name = path.name.removeprefix(".replaced_")
    target, count = path.with_name(f"{name}.{why}"), 0
    while target.exists():
        count += 1
        target = path.with_name(f"{name}.{why}.{count}")
    os.rename(path, target)
    sync_path(path.parent)
    return target


def set_aside_names(directory: Path) -> list[str]:
    """What was set aside in ``directory``."""
    return sorted(path.name for path in directory.iterdir() if _ASIDE.fullmatch(path.name))


class Retention(NamedTuple):
    """Which checkpoints stay.

    Attributes:
        last: so many newest; 0: all.
        best: so many of the lowest metric.
        every: those of iterations divisible by it; 0: none.
    """

    last: int = 0
    best: int = 0
    every: int = 0

    @classmethod
    def of(cls, flags: CheckpointConfig) -> Retention:
        """What the flags ask for. ``--save-retain-interval`` asks that others go, if only by and by."""
        every = flags.save_retain_interval or 0
        last = 1 if flags.keep_best_only else flags.keep_last
        return cls(max(last, 1) if every else last, flags.keep_best, every)


KEEP_ALL = Retention()


def excess_checkpoints(directory: Path, keep: Retention, newest: Path) -> list[Path]:
    """The checkpoints that may go: none that ``keep`` names, nor ``newest``, which was just written. A score of another
    metric than that of ``newest`` says nothing."""
    if not keep.last:
        return []
    numbered = list_steps(directory)
    steps = [path for _, path in numbered]
    kept = {newest, *steps[: keep.last], *(path for step, path in numbered if keep.every and step % keep.every == 0)}
    if keep.best:
        scored = []
        judged_by = _metric_name(read_manifest(newest))
        for path in steps:
            try:
                manifest = read_manifest(path)
            except (CheckpointError, OSError):
                continue  # no metric to be best by; whether it is damaged is for the next load to say
            if manifest.metric is not None and _metric_name(manifest) == judged_by:
                scored.append((manifest.metric, path))
        kept.update(path for _, path in sorted(scored)[: keep.best])
    return [path for path in steps if path not in kept]


def _metric_name(manifest: Manifest) -> str | None:
    """What the checkpoint's score measures; None where no training run wrote it."""
    training = manifest.meta.get("config", {}).get("training", {})
    return str(training["early_stopping_metric"]) if "early_stopping_metric" in training else None


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint: it disappears at once, so that no reader meets half of it."""
    trash = path.with_name(f".trash_{path.name.removeprefix('.replaced_')}")
    try:
        if trash.exists():
            shutil.rmtree(trash)
        os.rename(path, trash)
        shutil.rmtree(trash)
    except OSError as error:
        logger.warning("the old checkpoint %s could not be removed: %s", path, error)
