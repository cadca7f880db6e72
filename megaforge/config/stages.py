"""A run in two stages: the lines of each, and where the second begins and is kept.

A file of ``--config`` with a section ``stage_b``, which holds sections over those of the file, is of two stages. One
line trains both: stage A into ``--save DIR``, then stage B, which begins with stage A's last checkpoint, into
``DIR/stage_b``.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.config.checkpoint_source import newest_meta, same_directory
from megaforge.config.data_lists import OF_DATA
from megaforge.config.lengths import ROWS
from megaforge.config.schema import settings
from megaforge.config.yaml_files import ConfigLayer
from megaforge.errors import UserError

FOLDER = "stage_b"
# What stage B writes beside what stage A wrote, where the line names one place for both.
_FILES = ("logging.metrics_file", "logging.digest_file")
_FOLDERS = ("logging.tensorboard_dir", "logging.profile_dir", "checkpoint.save_replica", "checkpoint.phase6_output")


@dataclass(frozen=True)
class StageB:
    """How the line of a run in two stages is read for its second one.

    Attributes:
        flags: those of ``--stage-b-flags``, which hold against the section ``stage_b``.
    """

    flags: tuple[str, ...]

    @staticmethod
    def of(text: str | None) -> StageB:
        """
        Raises:
            UserError: the text cannot be cut into words.
        """
        try:
            return StageB(tuple(shlex.split(text or "")))
        except ValueError as error:
            raise UserError(f"--stage-b-flags {text}: {error}") from error


def for_stage_b(
    typed: Mapping[str, tuple[str, Any]], layer: ConfigLayer, own: Collection[str]
) -> dict[str, tuple[str, Any]]:
    """What of a line for both stages holds in stage B: what its section does not say otherwise.

    Args:
        typed: settings of the line, by key.
        layer: the section ``stage_b``.
        own: keys of ``--stage-b-flags``.
    """
    said = {*layer.values, *own}
    rows = [row for row in (*ROWS, OF_DATA) if said.intersection(row)]
    said = said.union(*rows)
    held = {key: value for key, value in typed.items() if key in own or key not in said}
    return {**held, "stages.stage": ("--stage", "b")}


def settle_places(values: dict[str, Any], origins: dict[str, str], *, after_a: bool) -> None:
    """Where stage B is kept and begins: ``--save DIR --load DIR`` become those of ``DIR/stage_b``, which begins with
    the checkpoint of ``DIR``; ``--load`` of another directory is what it begins with.

    Args:
        values, origins: of settings by key, changed in place.
        after_a: whether the same run trains stage A before.

    Raises:
        UserError: there is nothing to begin with, or stage A would not be kept.
    """
    save, load = values.get("checkpoint.save"), values.get("checkpoint.load")
    if after_a and save is None:
        raise UserError("stage B begins with stage A's last checkpoint: add --save DIR, or --stage a")
    begin = values.get("checkpoint.pretrained_checkpoint") or (save if after_a else load)
    if begin is None:
        raise UserError("--stage b: there is no model to begin with; add --load DIR, a run of stage A")
    if save is not None and (after_a or same_directory(save, load)):
        kept = save if not after_a and _is_stage_b(save) else str(Path(save) / FOLDER)
    else:
        kept = save
    goes_on = kept is not None and load is not None
    changed = {"save": kept, "load": kept if goes_on else None, "pretrained_checkpoint": begin, "ckpt_step": None}
    if after_a:  # these are about what stage A goes on from
        changed |= {"finetune": False, "reset_data": False}
    for name, value in changed.items():
        key = f"checkpoint.{name}"
        if key in values and values[key] != value or value:
            values[key], origins[key] = value, "stage B"
    for key in (*_FILES, *_FOLDERS) if after_a else ():
        if (value := values.get(key, settings()[key].default)) is not None:
            values[key], origins[key] = _beside(value, key in _FILES), "stage B"


def _is_stage_b(directory: str) -> bool:
    found = newest_meta(Path(directory))
    config = found[1].get("config") if found else None
    stages = config.get("stages") if isinstance(config, Mapping) else None
    return isinstance(stages, Mapping) and stages.get("stage") == "b"


def _beside(path: str, is_file: bool) -> str:
    if not is_file:
        return f"{path.rstrip('/')}/{FOLDER}"
    return str(Path(path).with_name(f"{Path(path).stem}.{FOLDER}{Path(path).suffix}"))
