"""Strong and weak scaling from one rank to two, measured, beside what the planner predicts for two, four and eight.

Each case trains a dense transformer of 5M parameters by the trainer's own step, one thread a rank: on one rank, and on
two ranks at a layout, turn about in the same two processes. Strong scaling keeps the global batch, weak scaling doubles
it. Efficiency is tokens/s of a rank beside those of the one rank, overhead the time beyond that of efficiency 1.
Memory is what a process that does nothing else has grown by at most.

The planner is told what this machine does, measured in the same run: the rate of matrix products on one thread, of
copies, and of sums over the two ranks. It then plans this machine as it plans GPUs (``tools/plan.py scaling``).

    python tests/bench/bench_scaling.py [--rounds 5] [--occupied] [--cases "dp, strong" ...]

``--occupied`` is for a machine that others use too: while one rank trains alone, the other does the same beside it, so
that either has as much of the machine as in the runs of two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.device import peak_memory_bytes
from megaforge.models.prepared_run import check_run
from megaforge.parallel.context import ParallelContext
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.scaling import Point, scaling_curve
from megaforge.training.peak_flops import measure_matmul_peak
from megaforge.training.setup import build_trainer, initialize_distributed, make_context
from megaforge.training.trainer import Trainer
from tests.bench.harness import print_json, print_table

RANKS, BATCH = 2, 8
PLANNED = (1, 2, 4, 8)
RUN = (
    *("--device", "cpu", "--mock-data", "--vocab-size", "4096", "--num-layers", "4", "--hidden-size", "256"),
    *("--num-attention-heads", "4", "--ffn-hidden-size", "704", "--layer-schedule", "attention", "--ffn", "dense"),
    *("--activation", "swiglu", "--seq-length", "256", "--num-workers", "0", "--train-iters", "1000", "--bf16"),
    *("--untie-embeddings-and-output-weights", "--micro-batch-size", "1", "--global-batch-size", str(BATCH)),
    *("--log-level", "error"),
)
# name -> (flags of two ranks, weak)
CASES = {
    "dp, strong": ((), False),
    "dp, weak": ((), True),
    "dp, ZeRO-1, weak": (("--zero", "1"), True),
    "tp, strong": (("--tp", "2"), False),
    "pp, strong": (("--pp", "2"), False),
}


def config_of(case: str, ranks: int) -> Config:
    """The case's run on so many ranks; one rank has no layout."""
    flags, weak = CASES[case]
    batch = ("--global-batch-size", str(BATCH * ranks if weak else BATCH))
    return parse_config([*RUN, *(flags if ranks > 1 else ()), *batch], prog="bench").config


def stepper(config: Config, ctx: ParallelContext) -> Callable[[], object]:
    """A function that trains one step; the first one has been done."""
    trainer: Trainer = build_trainer(check_run(config, ctx.world.size), ctx)
    batches = next(iter(trainer._loader(trainer.data, trainer.batches, 0)))

    def step() -> object:
        metrics = trainer.train_step(batches)
        trainer.optimizer.wait_for_parameters()
        return metrics

    step()
    return step


def join(rank: int, folder: str, config: Config) -> None:
    """Makes this process a rank of two, as a run does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    initialize_distributed(config)


def serve(rank: int, folder: str, case: str, rounds: int, occupied: bool) -> None:
    """One rank of a case; rank 0 writes [seconds alone, seconds of two] of every round."""
    config = config_of(case, RANKS)
    join(rank, folder, config)
    alone = stepper(config_of(case, 1), ParallelContext.single())
    both = stepper(config, make_context(config, "cpu"))
    rows = []
    for _ in range(rounds):
        seconds = []
        for step, idle in ((alone, not occupied and rank > 0), (both, False)):
            dist.barrier()
            start = time.perf_counter()
            if not idle:
                step()
            seconds.append(time.perf_counter() - start)
        rows.append(seconds)
        dist.barrier()
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(rows))
    dist.destroy_process_group()


def weigh(rank: int, folder: str, case: str, ranks: int) -> None:
    """Rank 0 of a run of ``ranks`` writes by how many bytes it has grown at most."""
    config = config_of(case, ranks)
    join(rank, folder, config)
    ctx = ParallelContext.single() if ranks == 1 else make_context(config, "cpu")
    (torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)).sum()
    before = peak_memory_bytes(ctx.device)
    if ranks > 1 or rank == 0:
        step = stepper(config, ctx)
        step()
    if rank == 0:
        Path(folder, "bytes").write_text(str(peak_memory_bytes(ctx.device) - before))
    dist.barrier()
    dist.destroy_process_group()


def rate(rank: int, folder: str) -> None:
    """Rank 0 writes what the machine does while both ranks do it: FLOP/s of a rank's products, bytes/s that it copies
    (read and written) and that it sends in sums over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    ctx = ParallelContext.create()
    products = measure_matmul_peak(ctx, torch.bfloat16) / RANKS
    source, target, sums = torch.ones(1 << 24), torch.ones(1 << 24), torch.ones(1 << 22)
    copies, reductions = [], []
    for _ in range(7):
        dist.barrier()
        start = time.perf_counter()
        target.copy_(source)
        copies.append(2 * source.nbytes / (time.perf_counter() - start))
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(sums)
        reductions.append(sums.nbytes / (time.perf_counter() - start))  # of two ranks a ring sends 2 (n - 1) / n = 1
    if rank == 0:
        rates = products, statistics.median(copies), statistics.median(reductions)
        Path(folder, "rates").write_text(json.dumps(rates))
    dist.destroy_process_group()


def spawned(function: Callable[..., None], result: str, *arguments: Any) -> Any:
    """What rank 0 of two processes writes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(function, (folder, *arguments), nprocs=RANKS)
        return json.loads(Path(folder, result).read_text())


def this_machine() -> Gpu:
    """A rank of this machine, in the planner's terms."""
    products, copies, sums = spawned(rate, "rates")
    print(
        f"a rank: {products / 1e9:.0f} GFLOP/s in bf16 products, copies {copies / 1e9:.1f} GB/s, "
        f"sends {sums / 1e9:.2f} GB/s in sums over two"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / RANKS
    return Gpu("a core of this machine", memory, products, copies, sums, sums, copies)


def planned(case: str, machine: Gpu) -> dict[int, Point]:
    """The planner's points at 1, 2, 4 and 8 ranks; the layout of two grows by dp, from one rank without any."""
    reached = Efficiency(matmul=1.0, grouped_matmul=1.0, attention=0.5, memory=1.0, node=1.0, network=1.0, host=1.0)
    points: dict[int, Point] = {}
    for ranks in PLANNED:
        [point] = scaling_curve(config_of(case, ranks), [ranks], machine, weak=False, efficiency=reached, libraries=0.0)
        each = point.time.tokens_per_second / ranks
        alone = points[1].time.tokens_per_second if points else each
        points[ranks] = Point(point.layout, point.memory, point.time, each / alone)
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of one rank and of two")
    parser.add_argument("--occupied", action="store_true", help="the machine is in use: see above")
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), choices=tuple(CASES), help="which cases (all)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    machine = this_machine()
    rows: list[list[object]] = []
    cases = {}
    for case in arguments.cases:
        weak = CASES[case][1]
        seconds = spawned(serve, "seconds", case, arguments.rounds, arguments.occupied)
        shares = [alone / both if weak else alone / (RANKS * both) for alone, both in seconds]
        took = [statistics.median(column) for column in zip(*seconds, strict=True)]
        grown = [spawned(weigh, "bytes", case, ranks) for ranks in (1, RANKS)]
        for ranks, point in planned(case, machine).items():
            measured: list[object] = ["-"] * 5
            if ranks <= RANKS:
                median = statistics.median(shares) if ranks > 1 else 1.0
                spread = f"{min(shares):.0%} to {max(shares):.0%}" if ranks > 1 else "-"
                place = ranks - 1
                measured = [took[place], f"{median:.0%}", spread, f"{1 / median - 1:.0%}", f"{grown[place] / 1e6:.0f}"]
            predicted: list[object] = [point.time.total, f"{point.efficiency:.0%}", f"{point.overhead:.0%}"]
            rows.append([case, ranks, *measured, *predicted, f"{point.memory.total / 1e6:.0f}"])
            if ranks == RANKS:
                cases[case] = {
                    "ratio": round(statistics.median(shares), 4),
                    "min": round(min(shares), 4),
                    "max": round(max(shares), 4),
                    "predicted": round(point.efficiency, 4),
                    "memory_bytes": grown[1],
                    "predicted_memory_bytes": round(point.memory.total),
                    "peer": "a rank alone" + (", beside another such" if arguments.occupied else ""),
                }
    header = ["case", "ranks", "step s", "efficiency", "spread", "overhead", "MB a rank"]
    header += ["planned step s", "efficiency", "overhead", "MB a rank"]
    print_table("scaling: measured, and planned", header, rows)
    print_json("scaling", cases)


if __name__ == "__main__":
    main()
