#!/usr/bin/env python3
"""Takes a model over from the phase before and hands it on to the next, by the folders and keys that they use.

    python tools/phase_interface.py config phase5.yaml --save mine.yaml
    python tools/phase_interface.py import --phase4 phase4/ --save runs/start --config phase5-base
    python pretrain_cdrmix.py --config phase5-base --load runs/start --finetune --save runs/phase5 ...
    python tools/phase_interface.py export --load runs/phase5 --output phase6/ [--compliance-level basic]

config turns a configuration of that pipeline into one for --config, and says which keys change nothing here; the preset
phase5-base is its published example. import reads compression_metadata.json and compressed_model.pt (method 'bitnet',
width 1; nothing in them is executed) and writes a checkpoint of step 0; any flag of the model may follow. export writes
trained_model.pt and phase5_metadata.json from a run's newest checkpoint, as --phase6-output does at the end of a run,
and the run's compliance report beside them, which says whether it is nasa_compliant. What the report has to reach is as
the run had it, unless the flags say otherwise; with enforcement nothing is written where it does not.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, number
from megaforge.config.compliance_config import LEVELS
from megaforge.config.entry import run_entry
from megaforge.errors import UserError


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line: its own flags, and those of the model."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=ArgumentParser)
    taken = commands.add_parser("import", help="phase 4's folder -> a checkpoint to start from")
    taken.add_argument("--phase4", required=True, metavar="DIR", help="holds the compressed model and its metadata")
    taken.add_argument("--save", required=True, metavar="DIR", help="where the checkpoint goes")
    given = commands.add_parser("export", help="a checkpoint -> phase 6's folder")
    given.add_argument("--load", required=True, metavar="DIR|FILE.safetensors", help="a run's --save directory")
    given.add_argument("--output", required=True, metavar="DIR", help="where the files go")
    given.add_argument("--compliance-level", choices=LEVELS, help="that the report has to reach (default: the run's)")
    given.add_argument("--min-compliance-score", type=number(0, 1), metavar="X", help="the same of its score")
    given.add_argument(
        "--enforce-compliance",
        action=argparse.BooleanOptionalAction,
        help="write nothing where the report does not pass (default: as the run had it)",
    )
    written = commands.add_parser("config", help="the pipeline's configuration -> ours")
    written.add_argument("file", metavar="FILE.yaml", help="theirs")
    written.add_argument("--save", required=True, metavar="FILE.yaml", help="ours; must be new")
    flags, rest = parser.parse_known_args(arguments)
    if rest and flags.command != "import":
        takes = "--load, --output and its own flags" if flags.command == "export" else "FILE.yaml and --save"
        parser.error(f"{rest[0]}: {flags.command} takes {takes} only")
    return flags, rest


def main() -> int:
    """Runs the command; 0 when its result is written."""
    flags, rest = parse_arguments()
    if flags.command == "export":
        _export(flags)
        return 0
    if flags.command == "config":
        _config(flags)
    else:
        _import(flags, rest)
    return 0


def _export(flags: argparse.Namespace) -> None:
    from megaforge.checkpoint.phase_interface import export_phase6
    from megaforge.checkpoint.sources import open_source
    from megaforge.training.compliance_stage import asked_of, measure_handed_on, refusal

    source, found = open_source(flags.load), None
    asked = asked_of(source.meta, flags.compliance_level, flags.min_compliance_score, flags.enforce_compliance)
    run = source.path.parent
    if (run / source.path.name).is_dir():
        found, lacking = measure_handed_on(run, asked, Path(flags.output))
        print(f"compliance: score {found.score:.4f}, asked: {asked.compliance_level}, {asked.min_compliance_score:g}")
        for one in lacking:
            print(f"lacking: {one}")
        if asked.enforce_compliance and not found.passed:
            raise refusal(asked, lacking)
    else:
        print(f"{source.path} is a file, which says nothing of its run: nasa_compliant is false")
    print(f"{export_phase6(source, flags.output, found)}: written from step {source.step} of {source.path}")


def _config(flags: argparse.Namespace) -> None:
    from megaforge.config.phase5_config import TrainingConfig

    config, file = TrainingConfig.from_file(flags.file), Path(flags.save)
    text = config.as_yaml(flags.file)
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"--save {file}: --config takes files in .yaml; give it such a name")
    if file.exists():
        raise UserError(f"--save {file}: it exists; remove it, or name another file")
    file.write_text(text, encoding="utf-8")
    for note in config.notes():
        print(note)
    print(f"{file}: for --config, on {config.ranks} rank{'s' * (config.ranks > 1)}")


def _import(flags: argparse.Namespace, rest: list[str]) -> None:
    from megaforge.config.cli import parse_config
    from megaforge.data.run_tokenizer import with_run_tokenizer

    config = parse_config(rest, prog="phase_interface.py import").config
    config, tokenizer, _ = with_run_tokenizer(config)
    from megaforge.checkpoint.phase_interface import import_phase4
    from megaforge.training.checkpointing import tokenizer_identity

    identity = None if tokenizer is None else tokenizer_identity(tokenizer)
    path = import_phase4(flags.phase4, flags.save, config, identity)
    print(f"{path}: written from {flags.phase4}; start from it with --load {flags.save} --finetune")


if __name__ == "__main__":
    run_entry(main)
