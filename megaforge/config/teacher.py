"""Which model teaches a run: what the checkpoint of ``--distill-from`` says of itself."""

from __future__ import annotations

from pathlib import Path

from megaforge.config.checkpoint_source import newest_meta
from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.config.schema import config_from_dict
from megaforge.errors import UserError


def teacher_model(config: Config) -> tuple[ModelConfig | None, str | None]:
    """The teacher that ``config`` names, as its checkpoint describes it; or None, and what to say where it cannot be
    read: the run will need it, and its memory is not counted."""
    name = config.distill.distill_from
    if name is None:
        return None, None
    try:
        found = newest_meta(Path(name))
        if found is not None:
            return config_from_dict(dict(found[1]["config"]), source=str(found[0])).model, None
    except (UserError, KeyError, TypeError, ValueError):
        pass  # loading says what is wrong with it
    return None, f"--distill-from {name}: no checkpoint to read there, so the teacher's memory is not counted"
