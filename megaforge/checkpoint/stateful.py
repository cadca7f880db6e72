"""What a run keeps in its checkpoints besides its weights: JSON and tensors of its parts, each under a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megaforge.parallel.flat_shard import Entry


@dataclass(frozen=True)
class Stateful:
    """How one part of a run goes on from a checkpoint.

    Attributes:
        state: gives what the part must be told then (JSON).
        load_state: takes that back.
        tensors: gives what it keeps in tensors, as (key, declaration, this rank's part): see :class:`TensorEntry`. Keys
            begin with the part's name and a dot. The tensors are filled in place, after ``load_state``, and must be
            there then: a part names the same ones before its first step as after its last.
    """

    state: Callable[[], dict[str, Any]]
    load_state: Callable[[dict[str, Any]], None]
    tensors: Callable[[], Iterable[Entry]] = tuple


def tensors_of(parts: Mapping[str, Stateful]) -> list[Entry]:
    """The tensors of all ``parts``.

    Raises:
        ValueError: a key does not begin with its part's name.
    """
    entries = [(name, entry) for name, part in parts.items() for entry in part.tensors()]
    for name, (key, _, _) in entries:
        if not key.startswith(f"{name}."):
            raise ValueError(f"the tensor {key!r} of {name!r} must be named {name}.SOMETHING")
    return [entry for _, entry in entries]


def state_prefixes(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """How the keys of those tensors of a checkpoint begin that are not weights, by its ``meta``."""
    return tuple(f"{name}." for name in meta.get("state", {}))
