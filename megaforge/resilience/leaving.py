"""How a run leaves, so that whoever starts it again knows what to do: a status, and a mark beside its checkpoints.

``--save DIR`` holds ``DIR/completed`` once nothing is left to do: the same line then ends at once with status 0. Where
a run was asked to end before that, there is ``DIR/unfinished``, and it leaves with ``--requeue-exit-code``. A run that
failed leaves neither. Needs no torch: both are asked first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaforge.config.checkpoint_source import newest_meta, same_directory
from megaforge.config.config import Config
from megaforge.config.launcher import Launch
from megaforge.config.schema import config_to_dict
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.json_text import parse_json

COMPLETED, UNFINISHED = "completed", "unfinished"
STAGE_A_COMPLETED = "stage_a_completed"  # the first of a run's two stages
# What does not change what is left to do.
_INDIFFERENT = ("parallel", "logging", "alerts", "prometheus", "resilience", "dry_run", "stages")


def check_requeue_status(config: Config, launch: Launch) -> None:
    """
    Raises:
        UserError: the launcher would take ``--requeue-exit-code`` for a failure and start the ranks again.
    """
    status = config.resilience.requeue_exit_code
    if status and launch.launcher == "torchrun":
        raise UserError(
            f"--requeue-exit-code {status}: torchrun takes it for a failure, starts the ranks again or itself leaves "
            f"with status 1; leave it out and look for {config.checkpoint.save}/{COMPLETED}, which is there once "
            "nothing is left to do, or start the ranks with srun or mpirun"
        )


def nothing_left(config: Config, completed: str = COMPLETED) -> str | None:
    """What to say where the run of ``config``, as its command line has it, was completed before and is not to be
    started again; None where there is something to do.

    Args:
        completed: the mark that says so.
    """
    flags = config.checkpoint
    if flags.save is None or config.training.skip_train or not same_directory(flags.save, flags.load):
        return None
    left = _read(Path(flags.save) / completed)
    if left is None or left.get("run") != _digest(config):
        return None
    found = newest_meta(Path(flags.save))
    if found is None or found[1].get("iteration") != left.get("iteration"):
        return None  # a checkpoint was taken away since
    return f"{flags.save}: complete since iteration {left['iteration']} ({left.get('reason')}); nothing is left to do"


def unmark(config: Config, marks: Sequence[str] = (COMPLETED, STAGE_A_COMPLETED, UNFINISHED)) -> None:
    """The run of ``config`` is about to do something: what it will leave behind is not known."""
    for name in marks:
        if config.checkpoint.save is not None:
            (Path(config.checkpoint.save) / name).unlink(missing_ok=True)


def mark(config: Config, iteration: int, reason: str, *, complete: bool, completed: str = COMPLETED) -> None:
    """Says below ``--save``, if there is one, how the run of ``config`` ended after ``iteration``; the file is there as
    a whole or not at all.

    Args:
        completed: the mark of one that is complete.

    Raises:
        OSError: it cannot be written.
    """
    if config.checkpoint.save is None or config.training.skip_train:
        return
    path = Path(config.checkpoint.save) / (completed if complete else UNFINISHED)
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        json.dump({"iteration": iteration, "reason": reason, "run": _digest(config)}, file)
        file.write("\n")


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        left = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return left if isinstance(left, dict) else None


def _digest(config: Config) -> str:
    """Of all that says what there is to do; one that asks for more, or otherwise, is another."""
    asked = {name: section for name, section in config_to_dict(config).items() if name not in _INDIFFERENT}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
