#!/usr/bin/env python3
"""Source 002's interface, from the machine's report to three trained models:
python examples/fleet/three_models.py --output runs/three --mode parallel

``--small`` takes seconds of training: it shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.entry import run_entry
from megaforge.fleet import CognateCreator, ResourceManager, TrainingConfig, get_optimal_workers


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="where the models go")
    parser.add_argument("--mode", choices=("series", "parallel"), default="series", help="one after the other or not")
    parser.add_argument("--workers", type=integer(1, 64), default=3, help="models at once, if there is room")
    parser.add_argument("--small", action="store_true", help="4 epochs of a narrow model in place of 100")
    return parser.parse_args(arguments)


def main() -> int:
    """Trains three models and prints what each is."""
    flags = parse_arguments()
    report = ResourceManager().generate_resource_report()
    print(f"suggested: {report['recommendations']['training_mode_suggestion']}")
    workers, reason = get_optimal_workers(flags.workers)
    print(f"workers: {workers} ({reason})")
    small = {"model_size": 5000, "batch_size": 1, "epochs": 4, "sequence_length": 8} if flags.small else {}
    creator = CognateCreator(TrainingConfig(training_mode=flags.mode, max_parallel_workers=workers, **small))
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(creator, done))
    watcher.start()
    try:
        models = creator.create_three_models(flags.output)
    finally:
        done.set()
        watcher.join()
    for model in models:
        told = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
        print(f"{model}: loss {told['loss']:.4f} after {told['iteration']} steps in {told['seconds']:.0f} s")
    return 0


def watch(creator: CognateCreator, done: threading.Event) -> None:
    """Prints progress every few seconds."""
    while not done.wait(5.0):
        print(f"overall: {creator.get_training_progress()['overall_progress']:.1f}%", flush=True)


if __name__ == "__main__":
    run_entry(main)
