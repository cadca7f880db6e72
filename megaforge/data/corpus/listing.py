"""What corpus.yaml may hold: every key and every stage with its settings, as its dataclass declares them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from megaforge.data.corpus.recipe import RunSettings, ShardSettings, SourceSettings
from megaforge.registry import CORPUS_STAGES


def list_keys(stage: str | None = None) -> str:
    """All keys, or those of one stage.

    Raises:
        UserError: there is no such stage.
    """
    if stage is not None:
        return _section(stage, CORPUS_STAGES.get(stage))
    parts = [
        _section("corpus.yaml", RunSettings),
        _section("sources, each", SourceSettings),
        *(_section(f"stages: {name}", CORPUS_STAGES.get(name)) for name in CORPUS_STAGES.names()),
        _section("shard", ShardSettings),
    ]
    return "\n\n".join(parts)


def _section(title: str, cls: Any) -> str:
    summary = (inspect.getdoc(cls) or "").partition("\n")[0].replace("``", "")
    lines = [f"{title}    ({summary})"]
    for one in dataclasses.fields(cls):
        shown = list(one.default) if isinstance(one.default, tuple) else "" if one.default is None else one.default
        lines.append(f"  {one.name}: {one.metadata['help']}" + (f" [{shown}]" if shown not in ("", []) else ""))
    return "\n".join(lines)
