#!/usr/bin/env python3
"""From text that is found on this machine to two trained models, on the raw text and on the cleaned:

python examples/corpus/arms.py --output runs/corpus

Reads Python's library, Debian's documentation and manual pages; takes them as they are, and through the stages of
stages.yaml; trains ``cdrmix-tiny`` on both with the same tokenizer and the same number of tokens; and prints side by
side what each has become on documentation that neither has seen, Python's language reference. What is made is not made
again. ``--small`` takes seconds: a few sources and steps, too few to tell the arms apart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.cli import parse_config
from megaforge.config.entry import run_entry
from megaforge.data.corpus.manifest import read_manifest
from megaforge.data.corpus.pipeline import CorpusSettings, prepare_corpus
from megaforge.data.corpus.stdlib import pydoc_topics, stdlib_directory
from megaforge.data.train_tokenizer import TokenizerSettings, train_tokenizer
from megaforge.errors import UserError
from megaforge.inference.evaluation import evaluate_stream, read_text
from megaforge.inference.restore import load_trained_model

HERE = Path(__file__).resolve().parent
RAW, CLEANED = "raw", "cleaned"
PYTHON, DOCS, MANUAL = "python", "docs", "manual"
DOCUMENTATION = {DOCS: ("/usr/share/doc", "web"), MANUAL: ("/usr/share/man/man[1-8]", "books")}
LIBRARY_EXCLUDES = ["test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "lib-dynload"]


@dataclass(frozen=True)
class Arm:
    """A corpus and the model that was trained on it."""

    manifest: dict[str, Any]
    bits_per_byte: float
    accuracy: float


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="where everything is written")
    parser.add_argument(
        "--sources", nargs="+", choices=(PYTHON, *DOCUMENTATION), default=[PYTHON, *DOCUMENTATION], help="what is read"
    )
    parser.add_argument("--workers", type=integer(1, 4096), default=os.cpu_count() or 1, help="processes that clean")
    parser.add_argument("--iters", type=integer(1), default=300, help="training steps of each arm, of 2,048 tokens")
    parser.add_argument("--small", action="store_true", help="one folder of Python's library and 4 steps")
    return parser.parse_args(arguments)


def sources(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """What is found on this machine."""
    library = stdlib_directory()
    if flags.small:
        return [{"name": PYTHON, "files": [f"{library}/json", f"{library}/email"], "domain": "code"}]
    found: list[dict[str, Any]] = []
    if PYTHON in flags.sources:
        described = {"domain": "code", "licence": "PSF-2.0", "exclude": LIBRARY_EXCLUDES}
        found.append({"name": PYTHON, "files": [library], **described})
    for name, (pattern, domain) in DOCUMENTATION.items():
        if name in flags.sources and Path(pattern.partition("[")[0]).parent.is_dir():
            found.append({"name": name, "files": [pattern], "domain": domain, "exclude": ["changelog*", "*.json*"]})
    return found


def make_corpus(flags: argparse.Namespace, name: str, stages: list[Any], shard: dict[str, Any]) -> dict[str, Any]:
    """Prepares ``OUTPUT/NAME`` and returns its manifest."""
    output = Path(flags.output)
    recipe = {"model_scale": "1b", "sources": sources(flags), "stages": stages, "shard": shard}
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    prepare_corpus(CorpusSettings(str(path), str(output / name), flags.workers, on_error="skip"))
    manifest = read_manifest(output / name)
    assert manifest is not None
    return manifest


def write_heldout(output: Path, most: int | None) -> Path:
    """Python's language reference as JSON Lines, or its first topics."""
    path = output / "heldout.jsonl"
    lines = [json.dumps({"text": text, "source": name}) + "\n" for name, text in list(pydoc_topics())[:most]]
    if not lines:
        raise UserError("this Python comes without pydoc_data.topics, which the arms are compared on")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_tokenizer(flags: argparse.Namespace) -> str:
    """A tokenizer of the raw text, which both arms share."""
    path = Path(flags.output) / "tok.json"
    if not path.exists():
        _ = make_corpus(flags, "text", ["length"], {"jsonl": True})
        files = sorted((path.parent / "text" / "jsonl").glob("*.zst"))
        _ = train_tokenizer(TokenizerSettings(tuple(map(str, files)), str(path), 400 if flags.small else 2048))
    return str(path)


def train(flags: argparse.Namespace, name: str, manifest: dict[str, Any], tokenizer: str, heldout: Path) -> Arm:
    """Trains an arm, if it is not trained already, and measures it on the reference."""
    from megaforge.training.prepare import prepare
    from megaforge.training.setup import build_trainer, initialize_distributed

    output = Path(flags.output)
    prefixes = [str(output / name / dataset["prefix"]) for dataset in manifest["datasets"] if dataset["tokens"] > 0]
    checkpoint = output / f"{name}-model"
    line = [
        "--config",
        "cdrmix-test" if flags.small else "cdrmix-tiny",
        "--device",
        "cpu",
        "--split",
        "100,0,0",
        "--eval-iters",
        "0",
    ]
    line += ["--tokenizer-model", tokenizer, "--train-iters", str(4 if flags.small else flags.iters)]
    line += ["--data-path", *prefixes, "--save", str(checkpoint), "--load", str(checkpoint)]
    line += ["--metrics-file", str(output / f"{name}.metrics.jsonl")]
    run = prepare(parse_config(line, prog="examples/corpus/arms.py").config)
    build_trainer(run, initialize_distributed(run.config)).train()
    trained = load_trained_model(str(checkpoint), device="cpu")
    window = trained.config.data.seq_length
    stream = read_text(str(heldout), run.tokenizer)
    metrics = evaluate_stream(trained, stream, seq_length=window, batch_size=8)
    assert metrics.bits_per_byte is not None
    return Arm(manifest, metrics.bits_per_byte, metrics.accuracy)


def table(arms: dict[str, Arm]) -> str:
    """The arms side by side."""
    rows = [f"{'corpus':10} {'documents':>10} {'MB':>8} {'tokens':>12} {'bits per byte':>14} {'accuracy':>9}"]
    for name, arm in arms.items():
        size, tokens = arm.manifest["bytes"] / 1e6, arm.manifest["tokens"]
        rows.append(
            f"{name:10} {arm.manifest['documents']:10,} {size:8.2f} {tokens:12,} {arm.bits_per_byte:14.4f} "
            f"{arm.accuracy:9.1%}"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Runs the example."""
    flags = parse_arguments(arguments)
    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(flags)
    heldout = write_heldout(output, 2 if flags.small else None)
    stages = yaml.safe_load((HERE / "stages.yaml").read_text(encoding="utf-8"))
    shard = {"tokenizer_model": "tok.json"}
    arms = {}
    for name, chosen in ((RAW, []), (CLEANED, stages)):
        arms[name] = train(flags, name, make_corpus(flags, name, chosen, shard), tokenizer, heldout)
    print(table(arms))
    print(f"what was left out, and why: {output / CLEANED / 'report.html'}")
    return 0


if __name__ == "__main__":
    run_entry(main, "interrupted: what is finished is kept; run the same command again to continue")
