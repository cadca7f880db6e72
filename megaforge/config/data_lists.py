"""Datasets named in a file, or apart for training, validation and test: what ``--data-path`` and the rest become."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megaforge.config.schema import settings
from megaforge.errors import UserError

SYNTHETIC = "synthetic"
_PARTS = ("train", "valid", "test")
_SOURCES = tuple(
    f"data.{name}" for name in ("data_path", "data_args_path", "per_split_data_args_path", "train_data_path")
)

# All that says what is read, training and held-out data.
OF_DATA = (*_SOURCES, "data.mock_data", "data.valid_data_path", "data.test_data_path")


def read_lists(values: dict[str, Any], origins: dict[str, str], typed: Collection[str]) -> None:
    """Brings every form of naming datasets to ``--data-path`` and, for held-out ones, ``--valid-data-path`` and
    ``--test-data-path``. What the command line names holds against a file's.

    Args:
        values, origins: of settings by key, changed in place.
        typed: the keys that stand on the command line.

    Raises:
        UserError: two forms at once, or a file that cannot be read.
    """
    if values.get("data.data_path") == (SYNTHETIC,):
        _synthetic(values, origins)
    given = [key for key in _SOURCES if values.get(key)]
    if any(key in typed for key in given):
        for key in [key for key in given if key not in typed]:
            given.remove(key)
            del values[key]
    if len(given) > 1:
        flags = " and ".join(settings()[key].flag for key in given)
        raise UserError(f"{flags} exclude each other: each says what is read; leave out all but one")
    if values.get("data.data_args_path"):
        name = _taken(values, origins, "data.data_args_path", "data.data_path")
        values["data.data_path"] = tuple(_read("--data-args-path", name).split())
        if not values["data.data_path"]:
            raise UserError(f"--data-args-path {name}: is empty; write the words of --data-path there")
    if values.get("data.per_split_data_args_path"):
        name = _taken(values, origins, "data.per_split_data_args_path", "data.train_data_path")
        for part, words in _per_split(name).items():
            values[f"data.{part}_data_path"] = words
            origins[f"data.{part}_data_path"] = f"--per-split-data-args-path {name}"
    if values.get("data.train_data_path"):
        if "data.split" in typed:
            raise UserError(
                f"--split {values['data.split']} with --train-data-path: all of that is for training; leave out --split"
            )
        values["data.data_path"] = values.pop("data.train_data_path")
        values["data.split"] = "1,0,0"
        origins["data.split"] = "--train-data-path"
        origins["data.data_path"] = origins["data.train_data_path"]


def _synthetic(values: dict[str, Any], origins: dict[str, str]) -> None:
    """``--data-path synthetic`` is ``--mock-data`` by another name."""
    if Path(f"{SYNTHETIC}.idx").is_file():
        raise UserError(
            f"--data-path {SYNTHETIC} is random tokens, and there is a dataset {SYNTHETIC}.idx: write ./{SYNTHETIC} "
            "for that, or --mock-data for random tokens"
        )
    del values["data.data_path"]
    values["data.mock_data"] = True
    origins["data.mock_data"] = f"{origins['data.data_path']} {SYNTHETIC}"
    origins["data.data_path"] = "default"


def _taken(values: dict[str, Any], origins: dict[str, str], key: str, becomes: str) -> str:
    name = str(values.pop(key))
    origins[becomes] = f"{settings()[key].flag} {name}"
    return name


def _read(flag: str, name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _per_split(name: str) -> dict[str, tuple[str, ...]]:
    """The words of each part that the file has; a part may be one text or a list of words, as in Megatron-LM."""
    flag = "--per-split-data-args-path"
    try:
        content = json.loads(_read(flag, name))
    except ValueError as error:
        raise UserError(f"{flag} {name}: is not JSON ({error})") from error
    found: dict[str, tuple[str, ...]] = {}
    for part, words in content.items() if isinstance(content, dict) else ():
        listed = words.split() if isinstance(words, str) else words if isinstance(words, list) else []
        if part in _PARTS and words is not None:
            found[part] = tuple(map(str, listed))
    if not found.get("train"):
        raise UserError(
            f'{flag} {name}: it names nothing to train on; write {{"train": ["PREFIX"], "valid": ["PREFIX"]}}'
        )
    return found
