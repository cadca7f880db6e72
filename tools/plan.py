#!/usr/bin/env python3
"""Plans a run before it starts.

    python tools/plan.py params --config cdrmix-core-1b [any model flag]
    python tools/plan.py schedule --pp 4 --vpp 2 --microbatches 8 --schedule zb-v

``params`` prints the stored parameters of each component and the active ones (those that one token uses).
``schedule`` prints and draws a pipeline schedule: timeline, bubble and live activations of every rank (--help lists its
flags); a schedule that could deadlock is refused.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.cli import parse_config, run_entry
from megaforge.config.config import Config
from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from megaforge.models.parameter_count import count_parameters, total
from megaforge.models.pattern import layer_pattern
from megaforge.parallel.pipeline import plan_command


def params(arguments: list[str]) -> int:
    """Prints the table of parameter counts."""
    config: Config = parse_config(arguments, prog="plan.py params").config
    model = config.model
    if model.vocab_size is None and config.data.tokenizer_model is not None:
        tokenizer = load_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    counts = count_parameters(model)
    whole = total(counts)
    rows = [("component", "tensors", "stored", "active", "share of stored")]
    rows += [
        (c.component, f"{c.tensors:,}", f"{c.stored:,}", f"{c.active:,}", f"{c.stored / whole.stored:.1%}")
        for c in [*counts, whole]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"{config.name}: {layer_pattern(model)}")
    for row in rows:
        print(
            "  ".join(
                cell.rjust(w) if column else cell.ljust(w)
                for column, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    print(f"{whole.stored / 1e9:.3f}B stored, {whole.active / 1e9:.3f}B active")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"params": params, "schedule": plan_command.run}


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        given = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        raise UserError(f"plan.py: {given}: choose a command: {', '.join(COMMANDS)}")
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    run_entry(main)
