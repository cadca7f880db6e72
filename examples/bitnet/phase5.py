#!/usr/bin/env python3
"""The 1-bit training phase of a pipeline, in its ten steps:

python examples/bitnet/phase5.py --data corpus/train_text_document --tokenizer corpus/tok.json --output runs/phase5

input, initialise, convert, distribute, boost, loop, monitor, checkpoint, check, output. It takes phase 4's folder
(--phase4 DIR; without one it makes a stand-in: a new model's weights, each matrix as its signs times its mean), trains
that model with binary weights on --ranks processes by a configuration of that pipeline, encrypted and on record,
measures the run's compliance, and writes phase 6's folder if it passes what --compliance-level asks for.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.checkpoint.phase_interface import (
    COMPRESSED,
    COMPRESSION,
    FINISHED,
    TRAINED,
    export_phase6,
    import_phase4,
    load_phase4_models,
)
from megaforge.checkpoint.sources import open_source
from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.config.cli import parse_config
from megaforge.config.compliance_config import LEVELS, ComplianceConfig
from megaforge.config.config import Config
from megaforge.config.entry import run_entry
from megaforge.config.phase5_config import TrainingConfig
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.models.parameter_count import declared_parameters
from megaforge.monitor.sinks import read_metrics
from megaforge.training.checkpointing import tokenizer_identity
from megaforge.training.compliance_stage import measure_handed_on, refusal

REPO = Path(__file__).resolve().parents[2]
MODEL = {"model_size": "tiny", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_sequence_length": 64}
STEPS = {"num_epochs": 1, "batch_size": 4, "eval_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 10}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, metavar="PREFIX", help="the dataset to train on")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="its tokenizer")
    parser.add_argument("--output", required=True, metavar="DIR", help="where everything goes; must be new")
    parser.add_argument("--phase4", metavar="DIR", help="what phase 4 has left (default: a stand-in)")
    parser.add_argument("--ranks", type=integer(1), default=2, metavar="N", help="processes that train")
    parser.add_argument("--epochs", type=number(above=0), default=1.0, metavar="X", help="of the dataset")
    parser.add_argument("--compliance-level", choices=LEVELS, default="basic", help="what has to be reached")
    parser.add_argument("--min-compliance-score", type=number(0, 1), default=0.85, metavar="X", help="the same")
    return parser.parse_args()


def main() -> int:
    """Goes through the steps; 0 when phase 6's folder is written."""
    flags = parse_arguments()
    out = Path(flags.output)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--output {out}: it is not empty; name a new directory")
    out.mkdir(parents=True, exist_ok=True)
    theirs = configuration(flags, out)
    ours = initialise(theirs, flags, out)
    phase4 = take_in(flags.phase4, ours, out)
    convert(phase4, ours, flags, out)
    train(theirs, flags, out)
    watch(out)
    return hand_on(theirs, out)


def said(step: int, name: str, text: str) -> None:
    print(f"{step:2}/10 {name}: {text}", flush=True)


def configuration(flags: argparse.Namespace, out: Path) -> TrainingConfig:
    """That pipeline's own file, small: one of the published example's keys for each section."""
    compliance = {
        "enforce_compliance": True,
        "compliance_level": flags.compliance_level,
        "min_compliance_score": flags.min_compliance_score,
        "enable_audit_trail": True,
    }
    content = {
        "model": MODEL | {"vocab_size": vocabulary(flags)},
        "optimization": STEPS | {"num_epochs": flags.epochs, "learning_rate": 1e-3},
        "distributed": {"enabled": flags.ranks > 1, "backend": "gloo", "world_size": flags.ranks},
        "grokfast": {"enabled": True, "check_interval": 10},
        "nasa_compliance": compliance,
    }
    (out / "phase5.yaml").write_text(yaml.safe_dump({"training": content}, sort_keys=False), encoding="utf-8")
    return TrainingConfig.from_file(out / "phase5.yaml")


def vocabulary(flags: argparse.Namespace) -> int:
    """How many ids the tokenizer has."""
    _, tokenizer, _ = with_run_tokenizer(parse_config(tokenizer_flags(flags), prog="phase5.py").config)
    if tokenizer is None:
        raise UserError(f"--tokenizer {flags.tokenizer}: it gives no vocabulary")
    return tokenizer.vocab_size


def tokenizer_flags(flags: argparse.Namespace) -> list[str]:
    return ["--tokenizer-model", str(flags.tokenizer)]


def initialise(theirs: TrainingConfig, flags: argparse.Namespace, out: Path) -> Config:
    """Our configuration of theirs."""
    theirs.validate()
    (out / "ours.yaml").write_text(theirs.as_yaml("phase5.yaml"), encoding="utf-8")
    line = ["--config", str(out / "ours.yaml"), "--save", str(out / "run"), *tokenizer_flags(flags)]
    config, _, _ = with_run_tokenizer(parse_config(line, prog="phase5.py").config)
    return config


def take_in(folder: str | None, config: Config, out: Path) -> Path:
    """Phase 4's folder, validated."""
    path = out / "phase4" if folder is None else Path(folder)
    if folder is None:
        path.mkdir()
        torch.save(dict(stand_in(config)), path / COMPRESSED)
        metadata = '{"compression_method": "bitnet", "bit_width": 1, "stats": {"stand_in": true}}\n'
        (path / COMPRESSION).write_text(metadata, encoding="utf-8")
    found = load_phase4_models(path)
    method, width = found["metadata"]["compression_method"], found["metadata"]["bit_width"]
    said(1, "input", f"{len(found['weights'])} tensors of {path}, compressed by {method} to {width} bit")
    said(2, "initialise", f"{out / 'ours.yaml'}, of {out / 'phase5.yaml'}")
    return path


def stand_in(config: Config) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as phase 4 might leave them."""
    generator = torch.Generator().manual_seed(0)
    for name, spec in declared_parameters(config.model).items():
        value = torch.randn(spec.shape, generator=generator) * 0.02
        if spec.role == "matrix":
            value = value.sign() * value.abs().mean()
        yield name, torch.ones(spec.shape) if name.endswith("norm.weight") else value


def convert(phase4: Path, config: Config, flags: argparse.Namespace, out: Path) -> None:
    """The weights as a checkpoint that a run with binary weights starts from."""
    config, tokenizer, _ = with_run_tokenizer(config)
    path = import_phase4(phase4, out / "start", config, None if tokenizer is None else tokenizer_identity(tokenizer))
    said(3, "convert", f"{path}: products with {config.model.quantize_weights} weights from here on")


def train(theirs: TrainingConfig, flags: argparse.Namespace, out: Path) -> None:
    """The run itself, by its own command; encrypted by the user's key, or by one that is made for it."""
    if not {"MEGAFORGE_KEY", "MEGAFORGE_KEY_FILE"} & os.environ.keys():
        key = out / "key"
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(32) + "\n", encoding="utf-8")
        os.environ["MEGAFORGE_KEY_FILE"] = str(key.resolve())
    command = [sys.executable]
    if theirs.ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(theirs.ranks)]
    command += [str(REPO / "pretrain_cdrmix.py"), "--config", str(out / "ours.yaml"), "--data-path", flags.data]
    command += [*tokenizer_flags(flags), "--load", str(out / "start"), "--finetune", "--save", str(out / "run")]
    command += [
        "--metrics-file",
        str(out / "metrics.jsonl"),
        "--encrypt-checkpoints",
        "--split",
        "80,20,0",
        "--device",
        "cpu",
    ]
    said(4, "distribute", f"{theirs.ranks} rank{'s' * (theirs.ranks > 1)}, {theirs.distributed.backend}")
    said(5, "boost", f"times {theirs.grokfast.acceleration_factor:g} while the loss stands still (--plateau-boost)")
    said(6, "loop", shlex.join(command[1:]))
    if (status := subprocess.run(command, check=False).returncode) != 0:
        raise UserError(f"training ended with status {status}")


def watch(out: Path) -> None:
    """What the run has told of itself."""
    records = list(read_metrics(out / "metrics.jsonl"))
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    boosted = sum(record.get("lr_boost", 1) > 1 for record in records)
    said(7, "monitor", f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}, {boosted} of them boosted")
    source = open_source(out / "run")
    encrypted = "encrypted" if source.encrypted else "plain"
    said(8, "checkpoint", f"{source.path.name}, {len(source.tensors)} tensors, {encrypted}")


def hand_on(theirs: TrainingConfig, out: Path) -> int:
    """The compliance report, then phase 6's folder."""
    wanted = theirs.nasa_compliance
    asked = ComplianceConfig(wanted.enforce_compliance, wanted.compliance_level, wanted.min_compliance_score)
    found, lacking = measure_handed_on(out / "run", asked)
    said(9, "check", f"score {found.score:.4f}; asked: {asked.compliance_level}, {asked.min_compliance_score:g}")
    for one in lacking:
        print(f"      lacking: {one}")
    if asked.enforce_compliance and not found.passed:
        raise refusal(asked, lacking)
    folder = export_phase6(open_source(out / "run"), out / "phase6", found)
    metadata: dict[str, Any] = parse_json((folder / FINISHED).read_bytes())
    trained = torch.load(folder / TRAINED, weights_only=True)
    flags = ", ".join(f"{name} {trained[name]}" for name in ("phase5_complete", "bitnet_optimized", "nasa_compliant"))
    said(10, "output", f"{folder}: {flags}, score {metadata['nasa_compliance_score']}")
    return 0


if __name__ == "__main__":
    run_entry(main)
