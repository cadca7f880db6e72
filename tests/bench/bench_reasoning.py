"""What an agent's actions, branches and fast weights cost, beside the requirements' figures (features J29 to J33).

    python tests/bench/bench_reasoning.py [--width 256] [--layers 4] [--rounds 5]
    python tests/bench/bench_reasoning.py --load runs/agent --metrics-file agent.jsonl --core-steps 400

One thread. Without --load the model has random weights, which latencies do not depend on: RWKV-7 and attention in
turn, and texts of 16 chunks of 16 tokens. With --load it is a trained agent, whose acceptance and accuracy on new texts
of its task are measured too; the metrics file of its run says in how many steps it learnt.

CPU-milliseconds. An action is a decision with what it does to memory, the model's pass over its context left out (its
ratio to that pass is the overhead); a branch is a fork that reads 16 tokens, remembers them and is rolled back; an
adapter update is what a text of 512 tokens takes more where all fast weights change 7 times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.data.task_source import task_of
from megaforge.data.task_tokenizer import make_task_tokenizer
from megaforge.inference.open_model import add_model_flags, open_model
from megaforge.inference.staged import StagedModel
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.reasoning.agent.asking import Asker, Asking, Text, mean_numbers
from megaforge.reasoning.agent.episode import Episode
from megaforge.reasoning.agent.heads import heads_of
from megaforge.reasoning.agent.player import play, sampled
from tests.bench.harness import Measure, cpu_seconds, interleaved_ratio, print_json, print_table

PLASTIC = ("--peft", "plastic", "--plastic-rank", "8")
CHUNKS, CHUNK, CONTEXT, TEXTS = 16, 16, 64, 16
Row = list[object]


def small_model(options: argparse.Namespace, *more: str) -> tuple[StagedModel, Config]:
    """One with random weights and the heads of an agent."""
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "words.json"
        make_task_tokenizer(["kv_chunks"], str(words))
        flags = [
            *("--hidden-size", str(options.width), "--num-attention-heads", "4", "--rwkv-head-size", "64"),
            *("--hybrid-layer-pattern", "R-*-" * (options.layers // 2), "--vocab-size", "128"),
            *("--data-path", "tasks://kv_chunks", "--tokenizer-model", str(words), "--seq-length", "256"),
            *("--objective", "agent", "--agent-heads", "--memory-dim", str(options.width // 4)),
            *("--global-batch-size", "16", *more),
        ]
        config = parse_config(flags, prog="bench").config
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(config.model, ctx))
    initialize_parameters(model, ctx, seed=0)
    return StagedModel(model.eval()), config


def texts_of(count: int) -> list[Text]:
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, (count, CHUNKS + 1, CHUNK), generator=draws).tolist()
    return [Text(n, tuple(map(tuple, one[1:])), tuple(one[0][:2]), (1,)) for n, one in enumerate(tokens)]


class Passes:
    """A reader that counts the CPU-seconds of the model's passes."""

    def __init__(self, reader: Any) -> None:
        self._reader, self.heads, self.seconds = reader, reader.heads, 0.0

    def read(self, contexts: Any) -> Any:
        start = time.thread_time()
        found = self._reader.read(contexts)
        self.seconds += time.thread_time() - start
        return found


def actions(asker: Asker, rounds: int) -> tuple[float, float]:
    """Milliseconds of a decision beside the model's passes, and their ratio to these: medians of rounds."""
    took, shares = [], []
    for _ in range(rounds + 1):
        passes = Passes(asker.reader)
        episodes = [
            Episode(one.number, (one.chunks, one.question, one.answer), asker.new_root().memory, asker.setting)
            for one in texts_of(TEXTS)
        ]
        start = time.thread_time()
        play(episodes, passes, sampled, 0, 0)  # type: ignore[arg-type]
        rest = time.thread_time() - start - passes.seconds
        took.append(1e3 * rest / sum(len(one.decisions) for one in episodes))
        shares.append(rest / passes.seconds)
    return statistics.median(took[1:]), statistics.median(shares[1:])


def branch(asker: Asker, rounds: int) -> float:
    """Milliseconds of a branch of a text of 16 chunks: the median of rounds."""
    root, tokens = asker.new_root(), list(range(CHUNK))
    dim = root.memory.shape.dim
    for _ in range(CHUNKS):
        root.read(tokens)
        root.memory.write(torch.randn(dim), tokens)
        root.memory.summarize(torch.randn(2, dim))

    def run() -> None:
        one = root.fork()
        one.read(tokens)
        one.memory.write(torch.ones(dim), tokens)
        one.memory.summarize(torch.ones(2, dim))
        one.rollback()

    measure = cpu_seconds(run, 5)
    return 1e3 * statistics.median(measure() for _ in range(rounds + 1))


def reading(options: argparse.Namespace, *more: str) -> Measure:
    """A text of 512 tokens."""
    tokens = torch.randint(100, (1, 512), generator=torch.Generator().manual_seed(0))
    model, _ = small_model(options, *more)

    def run() -> None:
        with torch.no_grad():
            model.chunk.logits(tokens, last_only=True)

    return cpu_seconds(run, 3)


def memory_shares(asker: Asker, model: StagedModel) -> tuple[float, float, float]:
    """Bytes as shares of the model's: heads and summariser; the memory of a text of 64 chunks; what a branch holds
    of the model's state beside it."""
    whole = sum(parameter.nbytes for parameter in model.model.parameters())
    heads = heads_of(model.model)
    assert heads is not None
    own = sum(parameter.nbytes for parameter in heads.parameters())
    root = asker.new_root()
    for _ in range(64):
        root.memory.write(torch.randn(root.memory.shape.dim), range(CHUNK))
        root.memory.summarize(torch.randn(2, root.memory.shape.dim))
    memory = root.memory.nbytes
    root.read(list(range(CONTEXT)))
    return own / (whole - own), memory / (whole - own), (root.nbytes - memory) / (whole - own)


def learnt(file: str, core_steps: int) -> list[Row]:
    """From the metrics of a run of ``--objective agent``: when it was half right, and 90 % right."""
    steps = [json.loads(line) for line in Path(file).read_text().splitlines()]
    steps = [one for one in steps if one.get("kind") == "step" and "accuracy" in one]

    def first(least: float) -> int | None:
        """The first step of ten in a row whose mean accuracy is that."""
        for at in range(len(steps) - 9):
            if sum(one["accuracy"] for one in steps[at : at + 10]) / 10 >= least:
                return int(steps[at]["iteration"])
        return None

    half, most = first(0.5), first(0.9)
    ratio: object = round(most / core_steps, 2) if most and core_steps else "-"
    return [
        ["steps until half of the answers are right", half or "not reached", "10-20 a problem (J30)"],
        ["steps until 90 % are, over the backbone's", ratio if most else "not reached", "at most 2 (J33)"],
    ]


def trained_rows(options: argparse.Namespace, asker: Asker, config: Config, tokenizer: Any) -> list[Row]:
    from megaforge.reasoning.agent.texts import example_tokens

    name = task_of(config.data) or "kv_chunks"
    size = config.tasks.task_chunk_tokens
    texts = [
        Text(n, *example_tokens(name, tokenizer, 1, n, config.rl.agent_chunks, size)) for n in range(options.examples)
    ]
    found = mean_numbers(asker.ask_each(texts))
    return [
        ["branches with an advantage of at least 0", f"{found['accepted']:.1%}", "above 70 % (J22, J29)"],
        ["answers of accepted branches that are right", f"{found['accuracy']:.1%}", "above 90 % (J25, J28)"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    next(one for one in parser._actions if one.dest == "load").required = False
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--metrics-file", help="of the run that --load is of")
    parser.add_argument("--core-steps", type=int, default=0, help="steps that the backbone was trained for")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer: Any = None
    if options.load:
        trained = open_model(options)
        model, config, tokenizer = trained.model, trained.config, trained.load_tokenizer(options.tokenizer_model)
    else:
        model, config = small_model(options)
    asker = Asker(model, config, Asking(branches=4, most_tokens=8, end=tokenizer.eod if tokenizer else None))
    action, overhead = actions(asker, options.rounds)
    changing, still = (reading(options, *PLASTIC, "--plastic-chunk", size) for size in ("64", "512"))
    update = interleaved_ratio(changing, still, options.rounds)
    fast = interleaved_ratio(changing, reading(options), options.rounds)
    heads, memory, state = memory_shares(asker, model)
    per_update = 1e3 * (update.candidate - update.peer) / 7
    rows: list[Row] = [
        ["action, ms", action, "below 10 (J31)"],
        ["actions over the model's passes", f"{overhead:.1%}", "below 30 % (J32)"],
        ["branch of 16 tokens, ms", branch(asker, options.rounds), "below 50 (J31)"],
        ["adapter update, ms", per_update, "below 5 (J31)"],
        ["reading with fast weights over reading without", f"{fast.median - 1:.1%}", "below 30 % (J32)"],
        ["heads and summariser over the model's bytes", f"{heads:.2%}", "below 5 % (J32)"],
        ["memory of 64 chunks over the model's bytes", f"{memory:.2%}", "below 5 % (J32)"],
        ["a branch's state of the model over its bytes", f"{state:.2%}", "below 20 % (J32)"],
    ]
    if options.load:
        rows += trained_rows(options, asker, config, tokenizer)
    if options.metrics_file:
        rows += learnt(options.metrics_file, options.core_steps)
    what = options.load or f"{options.layers} layers, {options.width} wide, random weights"
    print_table(f"an agent of {what}", ["measured", "here", "required"], rows)
    print_json(
        "reasoning",
        {
            "fast weights": fast.case("the model without them"),
            "rows": {str(name): value for name, value, _ in rows},
        },
    )


if __name__ == "__main__":
    main()
