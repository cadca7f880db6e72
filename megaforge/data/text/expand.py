"""Directories that are data sets: what ``datasets``' ``save_to_disk`` wrote, and directories of Parquet files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megaforge.errors import UserError
from megaforge.json_text import parse_json

_SPLITS = re.compile(r"(train|test|validation|valid|dev)(?=[-_.])")


def expand_inputs(inputs: Sequence[str]) -> tuple[str, ...]:
    """``--input`` with every directory of a data set replaced by its files, in order; other paths stay.

    Raises:
        UserError: a directory holds several splits, of which one must be named.
    """
    return tuple(file for path in inputs for file in (_files(path) if Path(path).is_dir() else [path]))


def _files(path: str) -> list[str]:
    directory = Path(path)
    splits = _json(directory / "dataset_dict.json")
    if isinstance(splits, dict):
        names = [str(name) for name in splits.get("splits", [])]
        if len(names) != 1:
            raise UserError(f"--input {path} holds the splits {', '.join(names)}; give one, such as {path}/{names[0]}")
        return _files(str(directory / names[0]))
    state = _json(directory / "state.json")
    if isinstance(state, dict) and isinstance(state.get("_data_files"), list):
        return [str(directory / str(file["filename"])) for file in state["_data_files"]]
    files = sorted(directory.rglob("*.parquet"))
    splits_found = {match.group(0).strip("-_.") for file in files if (match := _SPLITS.match(file.name))}
    if len(splits_found) > 1:
        found = ", ".join(sorted(splits_found))
        raise UserError(f"--input {path} holds Parquet files of several splits ({found}); give the files of one")
    return [str(file) for file in files] or [path]


def _json(path: Path) -> object:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
