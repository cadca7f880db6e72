#!/usr/bin/env python3
"""Fine-tunes one base by every method of --peft on questions and answers from Python's documentation strings, and
prints what each trains, needs and gives:
python examples/finetune/arms.py --base runs/quickstart/checkpoints --output runs/finetune

An arm that has been trained is not trained again. ``--small`` takes seconds a method: it shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.documentation import write
from examples.training_run import REPO, train_once
from megaforge.config.arguments import ArgumentParser
from megaforge.config.entry import run_entry
from megaforge.errors import UserError
from megaforge.monitor.sinks import read_metrics

ARMS: dict[str, tuple[str, ...]] = {  # with the learning rate that suits each
    "full": ("--lr", "1e-3"),
    "lora": ("--peft", "lora", "--lr", "3e-3"),
    "qlora": ("--peft", "qlora", "--lr", "3e-3"),
    "adalora": ("--peft", "adalora", "--lr", "1e-2"),
    "prefix": ("--peft", "prefix", "--lr", "3e-3"),
    "p_tuning_v2": ("--peft", "p_tuning_v2", "--lr", "0.2"),  # keys move by so much a step
    "state": ("--peft", "state", "--lr", "1e-2"),
    "bitfit": ("--peft", "bitfit", "--lr", "1e-2"),
    "bitnet (QAT)": ("--quantize-weights", "ternary", "--lr", "1e-3"),
}
SMALL = ("--seq-length", "64", "--train-iters", "2", "--eval-interval", "2", "--eval-iters", "1")
REAL = ("--seq-length", "128", "--eval-iters", "40")


@dataclass(frozen=True)
class Arm:
    """What a run gave.

    Attributes:
        loss: cross-entropy of held-out answers at the end, in nats a token.
        share: of the model's parameters that are trained.
        memory: peak resident bytes.
        seconds: of a step, the median.
    """

    loss: float
    share: float
    memory: int
    seconds: float


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", required=True, metavar="DIR", help="a run's checkpoints, as the quickstart leaves them"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--train-iters", type=int, default=100, metavar="N", help="steps of an arm (default: 100)")
    parser.add_argument("--small", action="store_true", help="seconds in place of minutes")
    return parser.parse_args(arguments)


def line_of(flags: argparse.Namespace, output: Path) -> list[str]:
    """What all arms have in common."""
    return [
        *("finetune_cdrmix.py", "--pretrained-checkpoint", str(Path(flags.base).absolute()), "--device", "cpu"),
        *("--data-path", f"chat://{output / 'train.jsonl'}", "--valid-data-path", f"chat://{output / 'valid.jsonl'}"),
        *(SMALL if flags.small else REAL),
        *(() if flags.small else ("--train-iters", str(flags.train_iters), "--eval-interval", str(flags.train_iters))),
        *("--micro-batch-size", "4", "--global-batch-size", "4", "--lr-warmup-iters", "1" if flags.small else "10"),
        *("--log-interval", "1" if flags.small else "10", "--num-workers", "0"),
    ]


def train(flags: argparse.Namespace, name: str, output: Path) -> Arm:
    """Trains an arm unless it has been."""
    folder = name.split(" (")[0]
    metrics = output / f"{folder}.jsonl"
    train_once([*line_of(flags, output), *ARMS[name], "--save", str(output / folder)], metrics)
    records = read_metrics(metrics)
    steps = [record for record in records if record["kind"] == "step"]
    last = [record for record in records if record["kind"] == "evaluation"][-1]
    return Arm(
        last["loss"],
        steps[-1].get("trained_share", 1.0),
        max(int(record.get("peak_memory_bytes", 0)) for record in steps),
        statistics.median(record["step_seconds"] for record in steps),
    )


def judge(flags: argparse.Namespace, output: Path) -> float:
    """The base's own loss on held-out answers."""
    metrics = output / "base.jsonl"
    train_once([*line_of(flags, output), "--skip-train"], metrics)
    return float([record for record in read_metrics(metrics) if record["kind"] == "evaluation"][-1]["loss"])


def table(base: float, found: dict[str, Arm]) -> str:
    """A row a method, beside full fine-tuning where that is among them."""
    rows = [f"{'method':14} {'trained':>9} {'memory':>9} {'of full':>8} {'s/step':>7} {'loss':>8} {'of its gain':>12}"]
    rows.append(f"{'(base)':14} {'':>9} {'':>9} {'':>8} {'':>7} {base:8.4f} {'':>12}")
    full = found.get("full")
    for name, arm in found.items():
        memory = "" if full is None else f"{arm.memory / full.memory:.2f}"
        gain = "" if full is None else f"{(base - arm.loss) / (base - full.loss):.1%}"
        rows.append(
            f"{name:14} {arm.share:9.3%} {arm.memory / 1e6:6.0f} MB {memory:>8} {arm.seconds:7.2f} {arm.loss:8.4f} "
            f"{gain:>12}"
        )
    return "\n".join(rows)


def same_text(output: Path, base: str) -> bool:
    """Whether LoRA writes the same beside the base's matrices and merged into a checkpoint of their own."""
    merged, prompt = output / "merged", json.loads((output / "valid.jsonl").open().readline())["prompt"]
    python = [sys.executable]
    adapter = output / "adapter"
    for line in (
        ["--load", str(output / "lora"), "--save", str(adapter), "--to", "peft"],
        ["--load", base, "--adapter", str(adapter), "--merge", "--save", str(merged)],
    ):
        if not Path(line[line.index("--save") + 1]).exists():
            _ = _run([*python, "tools/convert_checkpoint.py", *line])
    ask = ["--prompt", prompt, "--temperature", "0", "--max-new-tokens", "24", "--device", "cpu", "--json"]
    loads = (["--load", str(output / "lora")], ["--load", base, "--adapter", str(adapter)], ["--load", str(merged)])
    texts = [_run([*python, "tools/generate.py", *load, *ask]) for load in loads]
    written = [next(json.loads(row)["text"] for row in text.splitlines() if row.startswith("{")) for text in texts]
    print(f"LoRA writes: {prompt}{written[0]}")
    return len(set(written)) == 1


def _run(line: list[str]) -> str:
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(line[1:])}: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    flags = parse_arguments()
    output = Path(flags.output).absolute()
    made = write(output, 200 if flags.small else None)
    print(f"{made[0]} questions to learn, {made[1]} held out")
    base = judge(flags, output)
    found = {name: train(flags, name, output) for name in flags.arms}
    print(table(base, found))
    if "lora" in found:
        gain = base - found["lora"].loss
        print(f"LoRA is {gain:.4f} nats a token better than the base on held-out answers")
        same = same_text(output, str(Path(flags.base).absolute()))
        print(f"merged, it writes {'the same tokens' if same else 'OTHER TOKENS'}")
        return 0 if same else 1
    return 0


if __name__ == "__main__":
    run_entry(main)
