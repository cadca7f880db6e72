#!/usr/bin/env python3
"""Plans a run before it starts.

    python tools/plan.py params --config cdrmix-core-1b [any model flag]
    python tools/plan.py memory --config cdrmix-core-40b --tp 8 --sp --pp 4 --ep 8 --dp 4 --zero 1 --gpu h100-80g
    python tools/plan.py memory --config cdrmix-core-40b --gpu h100-80g --search --gpus 256
    python tools/plan.py schedule --pp 4 --vpp 2 --microbatches 8 --schedule zb-v --output plans/zb-v.svg
    python tools/plan.py scaling --config cdrmix-core-1b --zero 1 --gpus 1 2 4 8 16 32 --weak
    python tools/plan.py goodput --gpus 1024 --mtbf-hours 7.9 --stall 1 --restart 300
    python tools/plan.py goodput --run runs/mine
    python tools/plan.py detect --output machine.json      (torchrun ... tools/plan.py detect measures ranks' links)
    python tools/plan.py data --data-schedule corpus/standard --data-path corpus/web corpus/code --output plans/data.png
    python tools/plan.py size --config cdrmix-core-1b --target 4b
    python tools/plan.py ladders
    python tools/plan.py activations
    python tools/plan.py compression --config parity --hidden-size 64
    python tools/plan.py docs

params prints the stored parameters of each component and the active ones (those that one token uses). memory
prints memory, communication, bubble, step time and MFU of a layout, or the fastest layouts that fit. schedule
draws a pipeline schedule. scaling predicts the same run on more and more GPUs. goodput says how often to save and
what failures cost at each scale; with --run, what a run's time has gone into. detect finds and measures the
machine, for the others to plan with. data shows which source is read when, and how often.
size finds the widths with which a model has so many parameters, stored or, with --active, active.
ladders dry-runs the jobs of run_scripts/slurm/cdrmix.txt, every rank of them.
activations compares predicted activation bytes with those that a CPU keeps.
compression measures what --compress-activations saves, and how far it moves gradients.
docs writes what these say into the documents that quote them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.cli import parse_config
from megaforge.config.entry import run_entry
from megaforge.config.pattern import layer_pattern
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.planning import plan_request


def params(arguments: Sequence[str], prog: str) -> None:
    """Prints the table of parameter counts."""
    parsed = parse_config(arguments, prog=prog)
    config, _, notes = with_run_tokenizer(parsed.config)
    for note in (*parsed.notes, *notes):
        print(note)
    model = config.model
    from megaforge.models.parameter_count import count_parameters, total
    from megaforge.planning.table import table

    counts = count_parameters(model)
    whole = total(counts)
    rows = [("component", "tensors", "stored", "active", "share of stored")]
    rows += [
        (c.component, f"{c.tensors:,}", f"{c.stored:,}", f"{c.active:,}", f"{c.stored / whole.stored:.1%}")
        for c in [*counts, whole]
    ]
    print(f"{config.name}: {layer_pattern(model)}")
    print(table(rows))
    print(f"{whole.stored / 1e9:.3f}B stored, {whole.active / 1e9:.3f}B active")


# The modules whose ``run`` is a command; imported once it is asked for, for most of them import torch.
MODULES = {
    "memory": "megaforge.planning.plan_command",
    "schedule": "megaforge.planning.schedule_command",
    "scaling": "megaforge.planning.scaling",
    "goodput": "megaforge.planning.goodput_command",
    "detect": "megaforge.planning.detect_command",
    "data": "megaforge.planning.reading_plan",
    "size": "megaforge.planning.size_command",
    "activations": "megaforge.planning.measured_activations",
    "compression": "megaforge.verification.compression",
    "ladders": "megaforge.verification.slurm_jobs",
    "docs": "megaforge.verification.update_docs",
}

EARLY: dict[str, Callable[[Sequence[str], str], object]] = {
    "memory": plan_request.parse,
    "scaling": plan_request.parse_scaling,
    "activations": plan_request.parse_activations,
    "compression": plan_request.parse_compression,
    "ladders": plan_request.parse_ladders,
    "detect": plan_request.parse_detect,
    "docs": plan_request.parse_docs,
}


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    command, arguments = (sys.argv[1:2] or ["nothing"])[0], sys.argv[2:]
    prog = f"plan.py {command}"
    if command == "params":
        params(arguments, prog)
    elif command in MODULES:
        if command in EARLY:
            EARLY[command](arguments, prog)  # a mistake is found before torch is imported
        importlib.import_module(MODULES[command]).run(arguments, prog)
    else:
        raise UserError(f"plan.py: {command}: choose a command: params, {', '.join(MODULES)}")
    return 0


if __name__ == "__main__":
    run_entry(main)
