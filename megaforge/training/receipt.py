"""``receipt.json`` in ``--save``: what a run was made of and what it came to, so that it can be made once more
(``tools/reproduce.py``)."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaforge.checkpoint.checkpoint import layout_of
from megaforge.checkpoint.directory import step_name
from megaforge.checkpoint.manifest import read_manifest, sums_digest
from megaforge.config.config import Config
from megaforge.config.schema import config_to_dict
from megaforge.data.sidecar import digest_of
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.monitor.events import finite, read_events
from megaforge.monitor.provenance import code_version, environment, source_digest
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import EvaluationMetrics, StepMetrics
    from megaforge.training.trainer import Trainer

logger = logging.getLogger(__name__)

RECEIPT_FILE = "receipt.json"
FORMAT, VERSION = "megaforge-receipt", 1


class Receipt(Callback):
    """Writes the receipt when a run with ``--save`` has ended without an error; on the first rank. A disk that does not
    take it is a warning."""

    place = Place.AFTER

    def __init__(self, directory: Path) -> None:
        self._path = directory / RECEIPT_FILE
        self._last: dict[str, Any] = {}
        self._evaluation: dict[str, Any] = {}

    @classmethod
    def of(cls, config: Config) -> Receipt | None:
        """None: nothing is saved."""
        return None if config.checkpoint.save is None else cls(Path(config.checkpoint.save))

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._last = {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "tokens": metrics.tokens}

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        self._evaluation = {"iteration": metrics.iteration, **metrics.values()}

    def on_train_end(self, trainer: Trainer) -> None:
        if not trainer.ctx.is_first_rank or not self._last or sys.exc_info()[1] is not None:
            return
        results = {"iteration": trainer.iteration, "complete": trainer.complete, **self._last}
        try:
            content = describe(trainer) | {"results": results | {"evaluation": self._evaluation or None}}
            content["results"]["checkpoint"] = _checkpoint(self._path.parent / step_name(trainer.saved_iteration))
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps(finite(content), indent=1) + "\n", encoding="utf-8")
        except (OSError, UserError) as error:
            logger.warning("%s: the receipt could not be written: %s", self._path, error)


def describe(trainer: Trainer) -> dict[str, Any]:
    """What a run is made of.

    Raises:
        UserError: its events cannot be read.
    """
    # As the file will have them: a number that is not finite becomes null there, and the digest is that of the file.
    config = finite(json.loads(json.dumps(config_to_dict(trainer.config))))
    data = finite({"state": trainer.data.state(0), "tokenizer": trainer.tokenizer})
    return {
        "format": FORMAT,
        "version": VERSION,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "configuration": {"digest": digest_of(config), "values": config},
        "code": {**code_version(), "digest": source_digest()},
        "environment": environment(),
        "data": {"digest": digest_of(data), **data},
        "layout": layout_of(trainer.ctx, len(trainer.model.chunks)),
        "started_from": _started_from(trainer),
    }


def _started_from(trainer: Trainer) -> dict[str, Any] | None:
    """The checkpoint of another run that this one began with; None: it began with nothing."""
    if trainer.events.path is None:
        return None
    for event in read_events(trainer.events.path).events:
        if event["kind"] == "save":  # what it loads from now on is its own
            return None
        if event["kind"] == "load" and event.get("path") is not None:
            return {name: event.get(name) for name in ("directory", "path", "sums", "weights_only")}
    return None


def _checkpoint(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    files = {name: record.sha256 for name, record in manifest.files.items()}
    return {"path": path.name, "sums": sums_digest(path), "encrypted": manifest.seal is not None, "files": files}
