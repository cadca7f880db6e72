#!/usr/bin/env python3
"""Plans a run before it starts.

    python tools/plan.py params --config cdrmix-core-1b [any model flag]

``params`` prints the stored parameters of each component and the active ones (those that one token uses).
"""

from __future__ import annotations

import dataclasses
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.cli import parse_config, run_entry
from megaforge.config.config import Config
from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from megaforge.models.parameter_count import count_parameters, total
from megaforge.models.pattern import layer_pattern


def params(config: Config) -> None:
    """Prints the table of parameter counts."""
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


COMMANDS = {"params": params}


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        given = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        raise UserError(f"plan.py: {given}: choose a command: {', '.join(COMMANDS)}")
    command = sys.argv[1]
    COMMANDS[command](parse_config(sys.argv[2:], prog=f"plan.py {command}").config)
    return 0


if __name__ == "__main__":
    run_entry(main)
