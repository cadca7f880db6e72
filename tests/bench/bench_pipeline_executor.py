"""What the pipeline executor costs where there is no pipeline: a global batch at pp 1 against a hand-written loop.

Both sides compute the losses and gradients of the same micro-batches with the same model and gradient reducer; the
peer is the plain loop (forward, divide, backward), ours goes through the schedule, the executor and the stage runner
as the trainer does. They are checked first to give the same gradients to the bit. Counted in CPU-seconds of this
process (one thread), for a machine that others use too.

Cases:
    small   d 128, 4 blocks, 8 micro-batches of 128 tokens: where overhead shows most. Goal 1.02.
    medium  d 256, 8 blocks, 8 micro-batches of 512 tokens. Goal 1.02.

    python tests/bench/bench_pipeline_executor.py [--rounds 15] [--cases small]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.model_config import ModelConfig
from megaforge.config.run_config import ParallelConfig
from megaforge.data.loader import Batch
from megaforge.models.hybrid import HybridModel, ModelOutput
from megaforge.models.stages import plan_pipeline
from megaforge.nn.losses import LossTerm, total_loss
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.training.forward_backward import ForwardBackward
from tests.bench.harness import interleaved_ratio, print_json, print_table

CASES = {"small": (128, 4, 128), "medium": (256, 8, 512)}
VOCAB, MICRO_BATCHES, GOAL = 1024, 8, 1.02
Step = Callable[[], None]


def micro_batches(length: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(0, VOCAB, (1, length + 1), generator=generator)
        start = torch.zeros(1, length, dtype=torch.bool)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, length), start))
    return batches


def steps(hidden: int, layers: int, length: int) -> tuple[Step, Step, GradientReducer]:
    """One global batch through the executor, the same in a loop, and the reducer that both fill."""
    cfg = ModelConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=4, num_experts=4, vocab_size=VOCAB, rwkv_head_size=32
    )
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(cfg, ctx))
    initialize_parameters(model, ctx, seed=0)
    reducer = GradientReducer(model, ctx)
    batches = micro_batches(length)
    tokens = MICRO_BATCHES * length
    runner = ForwardBackward(
        model, ctx, plan_pipeline(cfg, ParallelConfig(), MICRO_BATCHES, length), reducer, dtype=torch.float32
    )

    counts = {"labels": float(tokens), "sequences": float(MICRO_BATCHES), "tokens": float(tokens)}

    def share(output: ModelOutput) -> Tensor | None:
        return total_loss({"loss": LossTerm(output.loss_sum, "labels")} | output.terms, counts)

    def ours() -> None:
        reducer.zero_grad()
        runner.run(batches, lambda output, _: (share(output), None))
        reducer.finish_grad_sync()

    def loop() -> None:
        reducer.zero_grad()
        for number, batch in enumerate(batches, 1):
            reducer.set_last_microbatch(number == len(batches))
            loss = share(model(batch.tokens, batch.labels, batch.loss_mask, batch.document_start))
            assert loss is not None
            loss.backward()
        reducer.finish_grad_sync()

    return ours, loop, reducer


def check_same_gradients(ours: Step, loop: Step, reducer: GradientReducer) -> None:
    found = []
    for step in (ours, loop):
        step()
        found.append([p.main_grad.clone() for bucket in reducer.buckets for p in bucket.parameters])  # type: ignore[attr-defined]
    if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
        raise SystemExit("the executor and the loop give different gradients")


def measure(step: Step) -> Callable[[], float]:
    def seconds() -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured pairs of global batches a case")
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), choices=tuple(CASES), help="which cases (all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    cases = {}
    for name in arguments.cases:
        ours, loop, reducer = steps(*CASES[name])
        check_same_gradients(ours, loop, reducer)
        result = interleaved_ratio(measure(ours), measure(loop), arguments.rounds)
        rows.append([name, result.candidate, result.peer, result.median, result.min, result.max, GOAL])
        cases[name] = result.case("hand-written loop", goal=GOAL)
    print_table("a global batch at pp 1, CPU-seconds", ["case", "ours", "loop", "ratio", "min", "max", "goal"], rows)
    print_json("pipeline_executor", cases)


if __name__ == "__main__":
    main()
