"""``tools/plan.py size``: the widths with which a configuration has so many parameters.

Depth, pattern, experts and the size of heads stay; the hidden size, the number of heads and the FFNs' widths grow and
shrink together.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megaforge.config.arguments import ArgumentParser
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.planning.table import table

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_WIDEST = 1 << 20  # hidden size
_SHOWN = 3


def parameters(text: str) -> float:
    """A number of parameters: ``4b``, ``350M``, ``1.5e9``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    found = re.fullmatch(r"([0-9.]+(?:e\+?[0-9]+)?)([kmbt]?)", text.lower())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else math.nan
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters such as 4b, 350M or 1.5e9")
    return value


def parse_size(arguments: Sequence[str], prog: str) -> tuple[Config, argparse.Namespace]:
    """The command's own flags, and the configuration whose widths change.

    Raises:
        UserError: an unknown flag or value.
    """
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("--target", type=parameters, required=True, metavar="N", help="parameters, such as 4b or 350M")
    parser.add_argument("--active", action="store_true", help="the target is of those that a token uses, not of all")
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
    own, rest = parser.parse_known_args(arguments)
    parsed = parse_config(rest, prog=prog)
    config, _, notes = with_run_tokenizer(parsed.config)
    for note in (*parsed.notes, *notes):
        print(note)
    return config, own


def run(arguments: Sequence[str], prog: str = "plan.py size") -> None:
    """Prints the flags of the nearest widths, the nearest first."""
    config, own = parse_size(arguments, prog)
    found = nearest(config.model, own.target, active=own.active)
    rows = [("flags", "stored", "active", "of the target")]
    for model in found:
        stored, active = sizes(model)
        share = (active if own.active else stored) / own.target
        rows.append((flags_of(model), f"{stored:,}", f"{active:,}", f"{share:.1%}"))
    what = "active" if own.active else "stored"
    print(f"{config.name} with {own.target:,.0f} {what} parameters:")
    print(table(rows))


def nearest(model: ModelConfig, target: float, *, active: bool) -> list[ModelConfig]:
    """The widths of ``model`` whose number of parameters is nearest to ``target``, the nearest first.

    Raises:
        UserError: no width comes within a factor of two.
    """
    found: list[tuple[float, ModelConfig]] = []
    for wider in widths(model):
        size = sizes(wider)[active]
        found.append((abs(math.log(size / target)), wider))
        if size > 2 * target:
            break
    found.sort(key=lambda one: one[0])
    if not found or found[0][0] > math.log(2):
        least = min((sizes(wider)[active] for _, wider in found), default=0)
        raise UserError(
            f"--target {target:,.0f}: no width comes near it (the narrowest has {least:,} parameters); change "
            "--num-layers, --num-experts or --vocab-size as well"
        )
    return [wider for _, wider in found[:_SHOWN]]


def widths(model: ModelConfig) -> Iterator[ModelConfig]:
    """``model`` in every width that its heads allow, the narrowest first."""
    for heads in range(1, _WIDEST // model.head_dim + 1):
        wider = widened(model, heads)
        if wider is not None:
            yield wider


def widened(model: ModelConfig, heads: int) -> ModelConfig | None:
    """``model`` with so many attention heads of its size, and all widths in proportion; None where something does not
    come out even."""
    ratio = heads / model.num_attention_heads
    hidden, groups = heads * model.hidden_size, heads * model.query_groups
    if hidden % model.num_attention_heads or groups % model.num_attention_heads:
        return None
    changed: dict[str, Any] = {
        "num_attention_heads": heads,
        "hidden_size": hidden // model.num_attention_heads,
    }
    if model.num_query_groups is not None:
        changed["num_query_groups"] = groups // model.num_attention_heads
    for name in ("ffn_hidden_size", "moe_ffn_hidden_size", "mamba_num_heads"):
        width = getattr(model, name)
        if width is not None:
            unit = math.gcd(width, 128)
            changed[name] = max(unit, round(width * ratio / unit) * unit)
    try:
        wider = dataclasses.replace(model, **changed)
        wider.validate()
    except UserError:
        return None
    return wider


def sizes(model: ModelConfig) -> tuple[int, int]:
    """Stored and active parameters."""
    from megaforge.models.parameter_count import count_parameters, total

    whole = total(count_parameters(model))
    return whole.stored, whole.active


def flags_of(model: ModelConfig) -> str:
    """What to write for these widths."""
    names = ("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "moe_ffn_hidden_size")
    values = ((name, getattr(model, name)) for name in (*names, "mamba_num_heads"))
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values if value is not None)
