"""The table of ``docs/optimizers.md``: every update rule and schedule by its flag, and what its state takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

from megaforge.config.cli import parse_config
from megaforge.config.schema import settings
from megaforge.planning.memory import rank_state
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.registry import UPDATE_RULES, Registry

MODEL, RANKS = "cdrmix-core-1b", 8
HEAD = ("flag", "what it does", "zero 0", "zero 1", "zero 2")
RULE = ("---", "---", "---:", "---:", "---:")


def optimizer_table() -> str:
    """A row for every rule and schedule of ours, in Markdown."""
    rules = ((f"`--optimizer {name}`", _summary(UPDATE_RULES, name), *_bytes(name)) for name in UPDATE_RULES.builtin)
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEAD, RULE, *rules, *_schedules()))


def _schedules() -> Iterator[tuple[str, ...]]:
    styles = settings()["optimizer.lr_decay_style"].choices or ()
    for name in styles.builtin if isinstance(styles, Registry) else styles:
        text = _summary(styles, name) if isinstance(styles, Registry) else "see below"
        yield f"`--lr-decay-style {name}`", text, "0", "0", "0"


def _summary(registry: Registry, name: str) -> str:
    """One line about a part: its ``summary``, or the first sentence of its docstring."""
    part = registry.get(name)
    text = getattr(part, "summary", None) or (inspect.getdoc(part) or "").split("\n\n")[0]
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|").rstrip(".")


def _bytes(rule: str) -> Iterator[str]:
    """Bytes of masters and state for each parameter of :data:`MODEL` on one of :data:`RANKS` GPUs, at each stage."""
    for zero in (0, 1, 2):
        config = parse_config(["--config", MODEL, "--bf16", "--zero", str(zero)]).config
        chosen = dataclasses.replace(config.optimizer, optimizer=rule)
        layout = dataclasses.replace(planned_layout(config, RANKS), optimizer=chosen)
        parts = model_parts(config.model, layout.dtype)
        state = rank_state(parts, layout, cut_stages(parts, layout), 0)
        host = f" + {state.host / state.elements:.2f} host" if state.host else ""
        yield f"{state.optimizer / state.elements:.2f}{host}"
