#!/usr/bin/env python3
"""Trains the arms of the BitNet example one after the other, and prints what each has become:

python examples/bitnet/arms.py --data corpus/train_text_document --tokenizer corpus/tok.json --output runs/bitnet

The quickstart's model in full precision, ternary and binary, with the same steps; its full-precision checkpoint
continued into ternary, at once and by and by; then short runs with and without each option of quantization. What has
been trained is not trained again. ``--check`` fails where ternary is far behind, where going by and by does not help,
or where an option changes nothing. ``--small`` takes seconds: a small model and too few steps to tell the arms apart.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from options import OPTIONS, Option

from megaforge.checkpoint.packed_file import write_packed
from megaforge.checkpoint.sources import open_source
from megaforge.config.arguments import ArgumentParser
from megaforge.config.cli import parse_config
from megaforge.config.entry import run_entry
from megaforge.data.images import check_image, save_image
from megaforge.errors import UserError, require
from megaforge.inference.evaluation import evaluate_stream, read_dataset
from megaforge.inference.generation import Continuations, Sampling
from megaforge.inference.restore import load_trained_model
from megaforge.monitor.sinks import read_metrics
from megaforge.quant.packed import quantized_layers
from megaforge.quant.statistics import QuantizedSize, quantized_size
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer, initialize_distributed

FULL, TERNARY, BINARY = "full precision", "ternary", "binary"
ARMS: dict[str, tuple[str, ...]] = {
    FULL: (),
    TERNARY: ("--quantize-weights", "ternary"),
    BINARY: ("--quantize-weights", "binary"),
    "ternary, grokfast": ("--quantize-weights", "ternary", "--grokfast", "ema"),
}
TEACHER = "teacher"  # of the runs that distil
AT_ONCE, BY_AND_BY = "at once", "by and by"
WITHIN = 1.1  # times the bits per byte of full precision


@dataclass(frozen=True)
class Budget:
    """How much is trained.

    Attributes:
        base: flags of all runs.
        arm, continuation, option: iterations of a run.
        tokens, rounds: of what is timed in generation.
    """

    base: tuple[str, ...]
    arm: int
    continuation: int
    option: int
    tokens: int
    rounds: int


WHOLE = Budget(
    (
        *("--config", "cdrmix-tiny", "--micro-batch-size", "8"),
        # Not the preset's: qat_adam is compared with it.
        *("--optimizer", "adam", "--lr", "5e-3", "--min-lr", "1e-4", "--lr-mult", "embedding=1"),
    ),
    arm=450,
    continuation=150,
    option=60,
    tokens=100,
    rounds=5,
)
SMALL = Budget(
    (
        *("--config", "cdrmix-test", "--hybrid-layer-pattern", "RE", "--seq-length", "16"),
        *("--micro-batch-size", "1", "--global-batch-size", "1", "--eval-iters", "1"),
        *("--split", "80,20,0", "--lr-decay-style", "constant", "--lr", "1e-2"),
    ),
    arm=4,
    continuation=4,
    option=4,
    tokens=4,
    rounds=1,
)


@dataclass(frozen=True)
class Trained:
    """What is known of a run that has ended.

    Attributes:
        losses: of its steps.
        names: of all numbers that its steps recorded.
        bits: bits per byte of the validation part, by iteration.
        codes: of each quantized matrix, int8, by its path.
        bytes, full_bytes: of the model with packed codes, the rest in 16 bits; and with everything in 16 bits.
    """

    losses: list[float]
    names: list[str]
    bits: dict[int, float]
    codes: dict[str, Tensor]
    bytes: int = 0
    full_bytes: int = 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PREFIX", help="the dataset to train on")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="its tokenizer")
    held_out = "a dataset to measure (default, and with --small: a part of --data)"
    parser.add_argument("--heldout", metavar="PREFIX", help=held_out)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where checkpoints and metrics go, and curves.png"
    )
    parser.add_argument("--picture", metavar="FILE", help="image to write (default: curves.png in --output)")
    parser.add_argument(
        "--only", choices=("arms", "options"), help="the models, or the rows of options (default: both)"
    )
    parser.add_argument("--small", action="store_true", help="seconds in place of hours")
    parser.add_argument("--check", action="store_true", help="fail unless the numbers are as they should be")
    flags = parser.parse_args(arguments)
    if flags.check and flags.small and flags.only != "options":
        raise UserError("--check: --small tells no arms apart; leave one of the two away, or add --only options")
    return flags


class Example:
    """The runs in one output folder."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.budget = flags, SMALL if flags.small else WHOLE
        self.output = Path(flags.output).absolute()
        self.output.mkdir(parents=True, exist_ok=True)

    def train(
        self,
        name: str,
        iterations: int,
        more: tuple[str, ...],
        load: str | None = None,
        *,
        teacher: str | None = None,
    ) -> Trained:
        """Trains the run ``name`` unless it has been.

        Args:
            load: the arm whose checkpoint it begins with; None: random weights.
            teacher: the run whose checkpoint it distils.
        """
        stem = self.output / name.replace(", ", "-").replace(" ", "-")
        line = [*self.budget.base, "--device", "cpu", "--train-iters", str(iterations), *more]
        others = {"--load": load, "--distill-from": teacher}
        named = [word for flag, other in others.items() if other is not None for word in (flag, other)]
        done, command = stem.with_suffix(".pt"), shlex.join([*line, *named])
        if done.exists():
            kept = torch.load(done, weights_only=True)
            if kept.pop("command") != command:
                raise UserError(
                    f"--output {self.flags.output}: {name} was trained there by another command; choose another "
                    f"folder, or delete {done} and {stem} to train it anew"
                )
            return Trained(**kept)
        if stem.exists():
            raise UserError(f"--output {self.flags.output}: {name} was not trained to its end; delete {stem} first")
        metrics = stem.with_suffix(".jsonl")
        metrics.unlink(missing_ok=True)
        line += ["--data-path", self.flags.data, "--tokenizer-model", self.flags.tokenizer]
        line += ["--num-workers", "0", "--log-interval", "1", "--metrics-file", str(metrics)]
        if name in (*ARMS, TEACHER) or load is not None:
            line += ["--save", str(stem), "--save-interval", str(iterations)]
        if load is not None:
            line += ["--finetune", "--load", str(self.output / load.replace(" ", "-"))]
        if teacher is not None:
            line += ["--distill-from", str(self.output / teacher)]
        print(shlex.join(["python", "pretrain_cdrmix.py", *line]), flush=True)
        found = read(metrics, *pretrain(line))
        torch.save({"command": command, **vars(found)}, done)
        return found

    def arms(self) -> dict[str, Trained]:
        """The models that begin with random weights."""
        n = self.budget.arm
        every = ("--eval-interval", str(max(n // 9, 2)))
        return {name: self.train(name, n, (*more, *every)) for name, more in ARMS.items()}

    def continuations(self) -> dict[str, Trained]:
        """Full precision continued into ternary."""
        n = self.budget.continuation
        more = (*ARMS[TERNARY], "--lr", "2e-3", "--eval-interval", str(max(n // 15, 2)))
        by_and_by = ("--quant-lambda", "linear", "--quant-lambda-end-iters", str(max(n // 5, 1)))
        return {
            AT_ONCE: self.train(AT_ONCE, n, more, FULL),
            BY_AND_BY: self.train(BY_AND_BY, n, (*more, *by_and_by), FULL),
        }

    def option(self, option: Option) -> tuple[Trained, Trained]:
        """Short runs without and with it."""
        n = self.budget.option
        first, second = option.lines(n)
        if option.distils:
            _ = self.train(TEACHER, n, ())
        return self._short(first, n), self._short(second, n, TEACHER if option.distils else None)

    def _short(self, more: tuple[str, ...], iterations: int, teacher: str | None = None) -> Trained:
        name = "option " + " ".join(word.removeprefix("--").replace(":", "_").replace("/", "_") for word in more)
        return self.train(name.strip(), iterations, (*more, "--eval-interval", str(iterations)), teacher=teacher)


def pretrain(line: list[str]) -> tuple[dict[str, Tensor], QuantizedSize]:
    """Trains as ``pretrain_cdrmix.py`` does with these flags; the codes of the quantized matrices at the end."""
    run = prepare(parse_config(line, prog="examples/bitnet/arms.py").config)
    trainer = build_trainer(run, initialize_distributed(run.config))
    trainer.train()
    with torch.no_grad():
        codes = {path: op.codes(layer.matrix)[0].clone() for path, layer, op in quantized_layers(trainer.model)}
    return codes, quantized_size(trainer.model)


def read(metrics: Path, codes: dict[str, Tensor], size: QuantizedSize) -> Trained:
    """What a run wrote."""
    records = read_metrics(metrics)
    steps = [record for record in records if record["kind"] == "step"]
    bits = {r["iteration"]: r["bits_per_byte"] for r in records if r["kind"] == "evaluation"}
    names = sorted({name for record in steps for name in record})
    return Trained([r["loss"] for r in steps], names, bits, codes, size.packed_bytes, size.full_bytes)


@dataclass(frozen=True)
class Model:
    """A trained arm, measured.

    Attributes:
        bits: bits per byte of what is held out.
        run: how it was trained.
        file: bytes of its packed file; None in full precision.
        draw: a measure: CPU-seconds of a token.
    """

    bits: float
    run: Trained
    file: int | None
    draw: Callable[[], float]


def measure(example: Example, name: str, run: Trained) -> Model:
    """Reads an arm's checkpoint: with packed kernels for generation, where it is quantized."""
    heldout = None if example.flags.small else example.flags.heldout  # whole documents take minutes
    path = example.output / name.replace(", ", "-").replace(" ", "-")
    trained = load_trained_model(str(path), device="cpu")
    prompt, bits = list(range(1, 9)), last(run)
    if heldout is not None:
        stream = read_dataset(heldout, trained)
        metrics = evaluate_stream(trained, stream, seq_length=trained.config.data.seq_length, batch_size=8)
        if metrics.bits_per_byte is None:
            raise UserError(f"--heldout {heldout}: a dataset without its .json description knows no bytes")
        prompt, bits = stream.tokens[:8].tolist(), metrics.bits_per_byte
    file = None
    if trained.config.model.quantize_weights is not None:
        packed = path.with_suffix(".safetensors")
        packed.unlink(missing_ok=True)
        file = write_packed(open_source(str(path)), str(packed))[0].bytes
        trained = load_trained_model(str(packed), device="cpu", kernels=True)
    tokens = example.budget.tokens

    @torch.no_grad()
    def draw() -> float:
        batch = Continuations(trained.model, [prompt], Sampling(0.0, 0, 1.0, 0))
        start = time.process_time()
        for _ in range(tokens):
            batch.draw()
        return (time.process_time() - start) / tokens

    return Model(bits, run, file, draw)


def table_of_arms(models: dict[str, Model], rounds: int) -> str:
    """A row an arm; generation is timed turn about."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            spent = model.draw()
            if number:  # the first one warms up
                times[name].append(spent)
    torch.set_num_threads(threads)
    header = zip(
        ("bits/byte", "of full", "bytes", "smaller", "file", "tokens/CPU-s"), (9, 8, 12, 8, 12, 13), strict=True
    )
    rows = [f"{'model':20} " + " ".join(title.rjust(width) for title, width in header)]
    for name, model in models.items():
        file = "-" if model.file is None else f"{model.file:,}"
        rows.append(
            f"{name:20} {model.bits:9.4f} {model.bits / models[FULL].bits:8.3f} {model.run.bytes:12,} "
            f"{model.run.full_bytes / model.run.bytes:8.2f} {file:>12} {1 / statistics.median(times[name]):13,.0f}"
        )
    return "\n".join(rows)


def last(trained: Trained) -> float:
    return list(trained.bits.values())[-1]


def table_of_continuations(runs: dict[str, Trained], start: Trained) -> str:
    """Bits per byte of the validation part where ternary began, and in the end."""
    before = f"(validation part; full precision before: {last(start):.4f})"
    rows = [f"{'into ternary':20} {'bits/byte':>9}  {before}"]
    return "\n".join([*rows, *(f"{name:20} {last(run):9.4f}" for name, run in runs.items())])


def changed_codes(first: Trained, second: Trained) -> float | None:
    """Share of codes that differ; None where the runs have not the same quantized matrices."""
    if not first.codes or first.codes.keys() != second.codes.keys():
        return None
    pairs = [(codes, second.codes[path]) for path, codes in first.codes.items()]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def changes(option: Option, first: Trained, second: Trained) -> bool:
    """Whether the option does anything: to losses or codes, or to what is recorded where that is its purpose."""
    if option.records is not None:
        return option.records in second.names and option.records not in first.names
    return first.losses != second.losses or changed_codes(first, second) != 0


def row_of_option(option: Option, first: Trained, second: Trained) -> str:
    codes = changed_codes(first, second)
    share = "-" if codes is None else f"{codes:.1%}"
    effect = f"records {option.records}" if option.records in second.names else ""
    if not changes(option, first, second):
        effect = "CHANGES NOTHING"
    return f"{option.title:56} {last(first):8.4f} {last(second):8.4f} {share:>8}  {effect}".rstrip()


def draw(arms: dict[str, Trained], continued: dict[str, Trained], picture: str) -> None:
    """Validation bits per byte of the arms, and of the continuations."""
    require("matplotlib", extra="train", purpose="examples/bitnet/arms.py").use("Agg")
    pyplot: Any = require("matplotlib.pyplot", extra="train", purpose="examples/bitnet/arms.py")
    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    for axes, runs, title in zip(both, (arms, continued), ("from random weights", "from full precision"), strict=True):
        for name, run in runs.items():
            axes.plot(list(run.bits), list(run.bits.values()), label=name, linewidth=1.2)
        axes.set(xlabel="iteration", ylabel="validation bits per byte", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    save_image(figure, picture, "--picture")
    pyplot.close(figure)
    print(f"wrote {picture}")


def faults_of_arms(bits: dict[str, float], continued: dict[str, Trained]) -> list[str]:
    """What the numbers contradict: ternary is near full precision, and going by and by is better."""
    faults = []
    if bits[TERNARY] > WITHIN * bits[FULL]:
        faults.append(
            f"ternary has {bits[TERNARY]:.4f} bits per byte, above {WITHIN} times the {bits[FULL]:.4f} of full"
        )
    if last(continued[BY_AND_BY]) >= last(continued[AT_ONCE]):
        faults.append(
            f"by and by has {last(continued[BY_AND_BY]):.4f} bits per byte, not below the "
            f"{last(continued[AT_ONCE]):.4f} of ternary at once"
        )
    return faults


def main() -> int:
    flags = parse_arguments()
    picture = flags.picture or str(Path(flags.output) / "curves.png")
    check_image(picture, "--picture")
    example, faults = Example(flags), []
    if flags.only != "options":
        arms, continued = example.arms(), example.continuations()
        models = {name: measure(example, name, run) for name, run in arms.items()}
        print(table_of_arms(models, example.budget.rounds))
        print(table_of_continuations(continued, arms[FULL]))
        draw(arms, continued, picture)
        faults += faults_of_arms({name: model.bits for name, model in models.items()}, continued)
    if flags.only != "arms":
        rows = [(option, *example.option(option)) for option in OPTIONS]
        print(f"{'option (what it is added to)':56} {'without':>8} {'with':>8} {'codes':>8}")
        for row in rows:
            print(row_of_option(*row))
        idle = [option for option, *runs in rows if not changes(option, *runs)]
        faults += [f"{option.title}: changes neither codes nor loss" for option in idle]
    for fault in faults if flags.check else []:
        print(fault)
    return 1 if flags.check and faults else 0


if __name__ == "__main__":
    run_entry(main)
