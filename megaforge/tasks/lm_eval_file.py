"""Which tasks are those of EleutherAI's lm-evaluation-harness, and whether their files can be right."""

from __future__ import annotations

import dataclasses
import os

from megaforge.config.schema import suggestion
from megaforge.config.yaml_nodes import at, compose, mapping_of
from megaforge.errors import UserError, require
from megaforge.tasks.task_file import SUFFIXES, read_text

PREFIX, PURPOSE = "lm_eval/", "a task of lm-eval"
_ITS_KEYS = frozenset(("dataset_path", "output_type", "doc_to_text", "include", "group", "tag"))


def is_lm_evals(name: str) -> bool:
    """Whether ``name`` is a task of lm-eval (``lm_eval/NAME``) or a file in its format, rather than ours.

    Raises:
        UserError: the file is missing or is not YAML.
    """
    if not name.endswith(SUFFIXES):
        return name.startswith(PREFIX)
    return bool(mapping_of(compose(read_text(name), name), name, "the file").keys() & _ITS_KEYS)


def check_task(name: str) -> None:
    """
    Raises:
        UserError: lm-eval is not installed, or a file has a key that it does not know.
    """
    stay_offline()
    known = require("lm_eval.config.task", extra="eval", purpose=PURPOSE).TaskConfig
    if name.endswith(SUFFIXES):
        keys = [field.name for field in dataclasses.fields(known)]
        its_own = ("include", "group", "group_alias", "aggregate_metric_list", "dataset_name", "class")
        for key, node in mapping_of(compose(read_text(name), name), name, "the file").items():
            if key not in (*keys, *its_own):
                raise UserError(f"{at(name, node)}: unknown key '{key}' of a task of lm-eval{suggestion(key, keys)}")


def stay_offline() -> None:
    """Libraries that lm-eval stands on ask no server, unless the user's environment says so."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of its bootstrap: a fork of a process with a process group
