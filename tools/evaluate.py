#!/usr/bin/env python3
"""Perplexity and bits per byte of a trained model on a text file or a dataset; or what it answers to tasks.

    python tools/evaluate.py --load runs/small --input book.txt
    torchrun --nproc-per-node 2 tools/evaluate.py --load runs/small --input data/heldout_text_document --json
    python tools/evaluate.py --load runs/small --input data/heldout_text_document \\
        --baseline bigram --train-data data/train_text_document
    python tools/evaluate.py --load runs/small --tasks passkey recall --lengths 256 512 --plot lengths.png

Every token is predicted once, from the tokens before it in a window of the training length; of a dataset the run was
trained on, only its validation part counts. Of a run with --eod-mask-loss too every token counts; its own validation
leaves out the first token of each document, and so differs. Under torchrun the ranks share the model (--pp
stages, each over --tp ranks) and the windows. Tasks are those of docs/evaluation.md, or files that say more.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.config.entry import run_entry
from megaforge.config.launcher import discover_launch
from megaforge.data.split import PARTS
from megaforge.errors import UserError
from megaforge.inference.open_model import add_model_flags, open_model
from megaforge.inference.task_command import add_task_flags, check_task_flags, evaluate_tasks

if TYPE_CHECKING:
    from megaforge.inference.evaluation import Stream
    from megaforge.inference.expert_load import ExpertUse
    from megaforge.inference.restore import TrainedModel
    from megaforge.training.metrics import EvaluationMetrics


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", help="a text, JSON Lines or Parquet file, or a dataset's prefix")
    what.add_argument("--tasks", nargs="+", metavar="NAME|FILE.yaml", help="what to ask the model")
    parser.add_argument("--part", choices=(*PARTS, "all"), help="which documents of a dataset (default: see above)")
    parser.add_argument("--json-key", metavar="KEY", help="where a JSONL line has its text (default: as in training)")
    parser.add_argument("--seq-length", type=integer(1), help="tokens of a window (default: as in training)")
    parser.add_argument("--batch-size", type=integer(1), default=8, help="windows computed at once")
    parser.add_argument("--baseline", choices=("bigram",), help="also fit this model and print it beside ours")
    parser.add_argument("--train-data", metavar="PREFIX", help="what the baseline is fitted on")
    parser.add_argument(
        "--expert-windows",
        type=integer(0),
        default=32,
        metavar="N",
        help="of a model with experts: count their use in so many windows, spread over the text; 0: do not",
    )
    parser.add_argument(
        "--expert-capacity-factor",
        type=number(above=0),
        metavar="F",
        help="count it as if --moe-expert-capacity-factor were F (default: as in training)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_task_flags(parser)
    flags = parser.parse_args(arguments)
    check_task_flags(flags)
    if (flags.baseline is None) != (flags.train_data is None):
        raise UserError("--baseline bigram and --train-data PREFIX need each other")
    return flags


def check_input(flags: argparse.Namespace) -> None:
    """Refuses flags that ``--input`` has no use for: a dataset has its tokens already, a text has no parts.

    Raises:
        UserError: there is one.
    """
    from megaforge.inference.evaluation import is_text

    kind, names = ("a text", ("part",)) if is_text(flags.input) else ("a dataset", ("tokenizer_model", "json_key"))
    for name in names:
        value = getattr(flags, name)
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} {value}: --input {flags.input} is {kind}; leave the flag out")


def load_stream(flags: argparse.Namespace, trained: TrainedModel) -> Stream:
    """The tokens to predict."""
    from megaforge.data.blend import dataset_prefix
    from megaforge.inference.evaluation import check_choices, is_text, read_dataset, read_text

    if is_text(flags.input):
        tokenizer = trained.load_tokenizer(flags.tokenizer_model)
        key = flags.json_key or trained.choices.get("json_key") or "text"
        return read_text(flags.input, tokenizer, key, trained.choices.get("append_eod") is not False)
    prefix = dataset_prefix(flags.input)
    check_choices(prefix, trained)
    return read_dataset(prefix, trained, flags.part)


def fit_baseline(flags: argparse.Namespace, trained: TrainedModel, stream: Stream) -> EvaluationMetrics:
    """A bigram model of the run's training documents, measured on the same tokens.

    Raises:
        UserError: it would be fitted on the tokens that it is measured on.
    """
    from megaforge.data.blend import dataset_prefix
    from megaforge.data.sidecar import read_sidecar
    from megaforge.inference.bigram import BigramModel
    from megaforge.inference.evaluation import check_choices, is_text, read_dataset, trained_on
    from megaforge.training.metrics import EvaluationMetrics

    prefix = dataset_prefix(flags.train_data)
    check_choices(prefix, trained)
    digest, sidecar = digest_at(prefix), read_sidecar(prefix)
    part = "train" if trained_on(digest, trained) else "all"
    if is_text(flags.input):
        with open(flags.input, "rb") as file:
            same = sidecar is not None and hashlib.file_digest(file, "sha256").hexdigest() in sidecar.sources
        measured = "all"
    else:
        same = digest == digest_at(dataset_prefix(flags.input))
        measured = flags.part or ("valid" if part == "train" else "all")
    if same and ("all" in (part, measured) or part == measured):
        raise UserError(
            f"--train-data {flags.train_data} holds what --input {flags.input} is measured on, so the baseline would "
            "know the answers; measure documents that it is not fitted on"
        )
    train = read_dataset(prefix, trained, part)
    model = BigramModel(train.tokens, trained.config.model.vocab_size or trained.config.model.padded_vocab_size())
    return EvaluationMetrics(0, model.nats(stream.tokens), len(stream.tokens) - 1, None, stream.text_bytes)


def digest_at(prefix: str) -> str:
    """The digest of a dataset's content."""
    from megaforge.data.indexed_dataset import IndexedDataset
    from megaforge.data.sidecar import content_digest, read_sidecar

    return content_digest(IndexedDataset(prefix), read_sidecar(prefix))


def print_table(rows: dict[str, EvaluationMetrics]) -> None:
    """One line a model."""
    print(f"{'model':<10} {'bits per byte':>14} {'perplexity':>12} {'loss':>9} {'accuracy':>9}")
    for name, metrics in rows.items():
        bits = "unknown" if metrics.bits_per_byte is None else f"{metrics.bits_per_byte:.4f}"
        accuracy = "" if metrics.accuracy is None else f"{metrics.accuracy:.1%}"
        print(f"{name:<10} {bits:>14} {metrics.perplexity:>12,.2f} {metrics.loss:>9.4f} {accuracy:>9}")


def main() -> int:
    flags = parse_arguments()
    _ = discover_launch()
    from megaforge.inference.evaluation import evaluate_stream
    from megaforge.parallel.distributed import shutdown

    if flags.tasks:
        evaluate_tasks(flags, open_model(flags))
        shutdown()
        return 0
    check_input(flags)
    trained = open_model(flags)
    stream = load_stream(flags, trained)
    if len(stream.tokens) < 2:
        raise UserError(f"--input {flags.input}: there is nothing to predict in a single token; give it more text")
    seq_length = flags.seq_length or trained.config.data.seq_length
    rows = {"ours": evaluate_stream(trained, stream, seq_length=seq_length, batch_size=flags.batch_size)}
    use = count_experts(flags, trained, stream, seq_length)
    if trained.ctx.is_first_rank:
        if flags.baseline is not None:
            rows[flags.baseline] = fit_baseline(flags, trained, stream)
        report(flags, trained, stream, rows, use)
    shutdown()
    return 0


def count_experts(flags: argparse.Namespace, trained: TrainedModel, stream: Stream, length: int) -> ExpertUse | None:
    """How the model's experts are used; None: it has none, or nobody asked. Collective.

    Raises:
        UserError: a capacity for experts that there are not.
    """
    from megaforge.config.expert_layers import ExpertLayers
    from megaforge.inference.expert_load import expert_use

    factor = flags.expert_capacity_factor
    if not ExpertLayers.of(trained.config.model).names:
        if factor is not None:
            raise UserError(f"--expert-capacity-factor {factor:g}: {trained.path} has no layer with experts")
        return None
    if not flags.expert_windows:
        return None
    return expert_use(
        trained,
        stream,
        seq_length=min(length, len(stream.tokens) - 1),  # a text shorter than a window is one
        batch_size=flags.batch_size,
        windows=flags.expert_windows,
        capacity_factor=factor,
    )


def print_experts(use: ExpertUse) -> None:
    """One line a layer."""
    limit = "no expert is ever full" if use.capacity_factor is None else f"capacity factor {use.capacity_factor:g}"
    print(f"experts in {use.windows} windows of {use.tokens:,} tokens, chosen as in training; {limit}")
    print(
        f"{'layer':<10} {'experts':>8} {'entropy':>10} {'of':>5} {'busiest':>8} {'capacity used':>14} {'overflow':>9}"
    )
    for own in use.layers:
        used = "" if own.capacity_used is None else f"{own.capacity_used:.1%}"
        print(
            f"{own.layer:<10} {own.experts:>8} {own.entropy_bits:>5.2f} bits {math.log2(own.experts):>5.2f} "
            f"{own.busiest:>7.2f}x {used:>14} {own.overflow:>9.2%}"
        )
    print(f"overflow {use.overflow:.2%} of all assignments")


def report(
    flags: argparse.Namespace,
    trained: TrainedModel,
    stream: Stream,
    rows: dict[str, EvaluationMetrics],
    use: ExpertUse | None = None,
) -> None:
    """Prints the result, as a table or as JSON."""
    if flags.json:
        described: dict[str, Any] = {name: finite(metrics.values()) for name, metrics in rows.items()}
        facts = {
            "checkpoint": str(trained.path),
            "iteration": rows["ours"].iteration,
            "input": flags.input,
            "ema": flags.ema,
        }
        if use is not None:
            described["experts"] = dataclasses.asdict(use)
        print(json.dumps(facts | {"documents": stream.documents, "text_bytes": stream.text_bytes} | described))
        return
    which = f"{trained.path} (average of the weights)" if flags.ema else trained.path
    print(f"{which} on {flags.input}: {stream.documents:,} documents, {rows['ours'].tokens:,} tokens predicted")
    if trained.config.data.eod_mask_loss:
        print("every token counts here; the run's own validation (--eod-mask-loss) leaves out documents' first tokens")
    print_table(rows)
    if use is not None:
        print_experts(use)


def finite(values: dict[str, float | int]) -> dict[str, float | int | None]:
    """JSON has no infinity: an overflowing perplexity becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


if __name__ == "__main__":
    run_entry(main)
