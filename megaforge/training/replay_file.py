"""``--save DIR/replay``: what is needed to look at a batch that a run left out, and to repeat its step."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaforge.checkpoint.directory import list_steps
from megaforge.data.skipped import SkippedSamples

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer

logger = logging.getLogger(__name__)

REPLAY = "replay"


def write_replay(trainer: Trainer, iteration: int, samples: range, reason: str, **values: float) -> str | None:
    """Writes ``replay/step_N.json`` and the tokens of the global batch beside it (``.npy``, int64 [samples, S + 1]).
    The first rank does; a disk that takes it not is a warning.

    Args:
        iteration: the step.
        samples: numbers of the batch's samples, as the run counts them.
        reason: why the batch was left out.
        values: numbers of the step.

    Returns:
        The file's name below ``--save``, or None where nothing was written.
    """
    save = trainer.config.checkpoint.save
    if save is None or not trainer.ctx.is_first_rank:
        return None
    name = f"step_{iteration:07d}"
    file = Path(save) / REPLAY / f"{name}.json"
    try:
        file.parent.mkdir(exist_ok=True)
        np.save(file.with_suffix(".npy"), _tokens(trainer.data, samples), allow_pickle=False)
        record = _record(trainer, iteration, samples, Path(save)) | {"reason": reason, "tokens": f"{name}.npy"}
        numbers = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        file.write_text(json.dumps(record | numbers, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s: the replay file of step %d could not be written: %s", file, iteration, error)
        return None
    return f"{REPLAY}/{file.name}"


def _record(trainer: Trainer, iteration: int, samples: range, save: Path) -> dict[str, Any]:
    """What says which step it was: in ``start_from`` the newest checkpoint before it."""
    before = [path.name for step, path in list_steps(save) if step < iteration]
    return {
        "iteration": iteration,
        "samples": [samples.start, samples.stop],
        "source_samples": [trainer.data.number(k) for k in samples],
        "skipped": [list(stretch) for stretch in trainer.data.stretches],
        "sequence_length": trainer.data.sequence_length(samples.start),
        "seed": trainer.config.training.seed,
        "start_from": max(before, default=None),
    }


def _tokens(data: SkippedSamples, samples: range) -> np.ndarray:
    length = data.sequence_length(samples.start) + 1
    tokens, marks = np.empty((len(samples), length), np.int64), np.zeros((len(samples), length), np.bool_)
    for row, k in enumerate(samples):
        data.fill(k, tokens[row], marks[row])
    return tokens
