"""Checkpoints and the audit trail hold each other: a manifest keeps the trail's head, the trail a digest of each.

So a trail that was cut, or written anew as a whole, does not fit the checkpoints, and an exchanged checkpoint does not
fit the trail.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaforge.checkpoint.directory import list_steps
from megaforge.checkpoint.manifest import read_manifest, sums_digest
from megaforge.errors import CheckpointError
from megaforge.monitor.audit import Trail

KEY = "audit"  # in a checkpoint's meta


def check_anchor(anchor: Mapping[str, Any] | None, trail: Trail) -> str | None:
    """What is wrong with ``trail``, or missing from it, by the head that a checkpoint keeps; None: nothing."""
    if anchor is None:
        return None
    if not isinstance(anchor, dict):
        return "what it keeps of the audit trail is not a head"
    if str(anchor.get("trail")) in replaced(trail):
        return None
    count = anchor.get("records")
    if anchor.get("trail") != trail.name or not isinstance(count, int) or count < 1:
        return f"it was saved under the audit trail {anchor.get('trail')}, and this is {trail.name}"
    if count > len(trail.hashes):
        return f"the trail had {count} records when it was saved, and has {len(trail.hashes)}: its end was cut off"
    if trail.hashes[count - 1] != anchor.get("hash"):
        return f"record {count - 1} of the trail is not the one that it was saved under: the trail was written anew"
    return None


def replaced(trail: Trail) -> set[str]:
    """Names of the trails before this one, which were set aside."""
    lists = [record.get("trails") for record in trail.records if record["kind"] == "replaces"]
    return {str(name) for names in lists if isinstance(names, list) for name in names}


def check_checkpoints(directory: Path, trail: Trail) -> list[str]:
    """What of the checkpoints in ``directory`` does not fit ``trail``; their own files are not read."""
    saved = {record.get("path"): record.get("sums") for record in trail.records if record["kind"] == "save"}
    problems = []
    for _, path in reversed(list_steps(directory)):
        try:
            anchor, digest = read_manifest(path).meta.get(KEY), sums_digest(path)
        except (CheckpointError, OSError) as error:
            problems.append(f"{path.name}: {error}")
            continue
        problem = check_anchor(anchor, trail)
        if problem is None and saved.get(path.name) not in (None, digest):
            problem = "it is not the checkpoint that the trail says was saved"
        if problem is None and path.name not in saved and anchor is not None and anchor.get("trail") == trail.name:
            problem = _unrecorded(anchor, trail)
        if problem is not None:
            problems.append(f"{path.name}: {problem}")
    return problems


def _unrecorded(anchor: Mapping[str, Any], trail: Trail) -> str | None:
    """Of a checkpoint without a record of its save: a kill between its publication and the record leaves one, after
    which nothing but a start follows."""
    after = [record["kind"] for record in trail.records[anchor["records"] :]]
    killed = not after or "start" in after
    return None if killed else "the trail does not say that it was saved"


def trails_of(directory: Path) -> set[str]:
    """Names of the trails whose heads the checkpoints in ``directory`` keep."""
    found = set()
    for _, path in list_steps(directory) if directory.is_dir() else ():
        try:
            anchor = read_manifest(path).meta.get(KEY)
        except (CheckpointError, OSError):
            continue
        if isinstance(anchor, dict):
            found.add(str(anchor.get("trail")))
    return found
