"""How much of the communication shows: a step of two gloo ranks with and without overlap, beside a silent one.

Each case trains the same model three ways, turn about: with overlap, without, and with every collective left out (its
result is wrong, its time is what computing alone takes). The exposed share is ``1 - silent / step``: the part of a step
that a rank spends waiting for the other, or communicating instead of computing. Two ranks on two cores have none to
spare for gloo's own threads, so overlap can hide waiting but not the copying and adding itself.

Cases:
    dp2     gradients of 4 buckets, reduced while the backward pass runs (--overlap-grad-reduce)
    tp2     gradients of inputs, reduced while those of weights are computed (--overlap-tp-comm)
    tp2 sp  the same with sequence parallelism (reduce-scatter)

    python tests/bench/bench_overlap.py [--rounds 9] [--hidden-size 512]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.parallel import mappings, region
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from tests.bench.harness import print_json, print_table

CASES = {"dp2": (1, False), "tp2": (2, False), "tp2 sp": (2, True)}
WAYS = ("overlap", "no overlap", "silent")
VOCAB, LENGTH, BATCH, RANKS = 1024, 256, 2, 2


class _Done:
    """A collective that was left out."""

    def wait(self) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Every collective of a step returns at once and leaves its output as it is."""
    with contextlib.ExitStack() as stack:
        own = ((mappings, "all_gather_single"), *((room, "reduce_scatter_single") for room in (mappings, region)))
        for module, name in ((dist, "all_reduce"), *own):
            stack.enter_context(mock.patch.object(module, name, lambda *_, **__: _Done()))
        yield


def make_step(hidden: int, ctx: ParallelContext, sequence_parallel: bool, overlap: bool) -> Callable[[], None]:
    cfg = ModelConfig(
        hybrid_layer_pattern="*-*-*-*-",
        hidden_size=hidden,
        num_attention_heads=8,
        vocab_size=VOCAB,
        activation="swiglu",
    )
    model = HybridModel(make_layer_context(cfg, ctx, sequence_parallel=sequence_parallel, overlap_tp_comm=overlap))
    initialize_parameters(model, ctx, seed=0)
    elements = sum(parameter.numel() for parameter in model.parameters())
    reducer = GradientReducer(model, ctx, overlap=overlap, bucket_size=elements // 4 + 1)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(ctx.dp.rank))
    batch: tuple[Tensor, ...] = (ids[:, :-1], ids[:, 1:], torch.ones(BATCH, LENGTH), torch.zeros(BATCH, LENGTH).bool())

    def step() -> None:
        reducer.zero_grad()
        reducer.set_last_microbatch(True)
        (model(*batch).loss_sum / (BATCH * LENGTH)).backward()
        reducer.finish_grad_sync()

    return step


def serve(rank: int, folder: str, case: str, hidden: int, rounds: int) -> None:
    """One rank; rank 0 writes the seconds of every way and round to ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    tp, sequence_parallel = CASES[case]
    ctx = ParallelContext.create(tp=tp)
    overlapped = make_step(hidden, ctx, sequence_parallel, True)
    plain = make_step(hidden, ctx, sequence_parallel, False)
    rows = []
    for number in range(rounds + 1):
        seconds = {}
        for way in WAYS if number % 2 else WAYS[::-1]:
            dist.barrier()
            start = time.perf_counter()
            with silence() if way == "silent" else contextlib.nullcontext():
                (plain if way == "no overlap" else overlapped)()
            seconds[way] = time.perf_counter() - start
        rows.append([seconds[way] for way in WAYS])
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(rows[1:]))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each way")
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the four blocks")
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), choices=tuple(CASES), help="which cases (all)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[list[object]] = []
    cases = {}
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(serve, (folder, case, arguments.hidden_size, arguments.rounds), nprocs=RANKS)
            seconds = torch.tensor(json.loads(Path(folder, "seconds").read_text()))
        overlap, plain, silent = seconds.unbind(1)
        shares = [(1 - silent / way) for way in (overlap, plain)]
        ratio = (overlap / plain).tolist()
        medians = [statistics.median(share.tolist()) for share in shares]
        spread = [f"{float(share.min()):.2f} to {float(share.max()):.2f}" for share in shares]
        rows.append(
            [case, float(silent.median()), medians[0], spread[0], medians[1], spread[1], statistics.median(ratio)]
        )
        cases[case] = {
            "exposed_share": round(medians[0], 4),
            "exposed_share_without_overlap": round(medians[1], 4),
            "ratio": round(statistics.median(ratio), 4),
            "min": round(min(ratio), 4),
            "max": round(max(ratio), 4),
            "peer": "the same step without overlap",
        }
    header = ["case", "silent s", "exposed", "spread", "without overlap", "spread", "overlap / without"]
    print_table("share of a step that communication takes, two gloo ranks", header, rows)
    print_json("overlap", cases)


if __name__ == "__main__":
    main()
