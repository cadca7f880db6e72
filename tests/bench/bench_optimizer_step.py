"""A whole optimizer step with Muon, beside torch.optim.Muon and AdamW on the same matrices.

    bash run_scripts/bench.sh optimizer_step [--rounds 7] [--models cdrmix-tiny 100M]

Models: cdrmix-tiny, and a dense transformer of 12 layers and 768 channels. Both sides update the same matrices, fp32
with bf16 products, and all other parameters by fused AdamW. The peer gets each expert and each of q, k and v as a
parameter of its own. CPU-seconds of one thread; the ratio is the peer's over ours.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from megaforge.config.cli import parse_config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.models.hybrid import HybridModel
from megaforge.optim import Optimizer
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import named_specs
from tests.bench.harness import interleaved_ratio, print_json, print_table

MODELS = {
    "cdrmix-tiny": ("--config", "cdrmix-tiny", "--vocab-size", "2048"),
    "100M": (
        "--config",
        "tiny",
        "--vocab-size",
        "8192",
        "--num-layers",
        "12",
        "--hidden-size",
        "768",
        "--num-attention-heads",
        "12",
    ),
}
CONFIG = OptimizerConfig(optimizer="muon", muon_fp32_matmul_prec="medium")


def make(flags: tuple[str, ...]) -> tuple[Callable[[], None], Callable[[], None], float]:
    """Our step, the peer's, and how many million parameters Muon updates."""
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(parse_config(list(flags)).config.model, ctx))
    ours = Optimizer(CONFIG, model, ctx)
    matrices, others, count = [], [], 0
    for number, (spec, parameter) in enumerate(named_specs(model)):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            parameter.normal_(std=0.02, generator=generator)
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.main_grad = gradient  # type: ignore[attr-defined]
        if spec.update != "matrix":
            others.append(nn.Parameter(parameter.detach().clone()))
            others[-1].grad = gradient.clone()
            continue
        count += parameter.numel()
        for piece in spec.pieces(ctx):
            parts = [piece.local_view(x).reshape(-1, *piece.shape[-2:]) for x in (parameter.detach(), gradient)]
            for weight, part in zip(*parts, strict=True):
                matrices.append(nn.Parameter(weight.clone()))
                matrices[-1].grad = part.clone()
    muon, adamw = torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3, fused=True)

    def theirs() -> None:
        muon.step()
        adamw.step()

    return lambda: ours.step(1e-3), theirs, count / 1e6


def cpu_seconds(step: Callable[[], None]) -> Callable[[], float]:
    def measure() -> float:
        start = time.thread_time()
        step()
        return time.thread_time() - start

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    cases = {}
    for name in arguments.models:
        ours, theirs, millions = make(MODELS[name])
        ratio = interleaved_ratio(cpu_seconds(theirs), cpu_seconds(ours), arguments.rounds)
        rows.append([name, millions, ratio.peer * 1e3, ratio.candidate * 1e3, ratio.median, ratio.min, ratio.max])
        cases[name] = ratio.case("this over torch.optim.Muon and fused AdamW")
    header = ["model", "million in matrices", "ours ms", "torch ms", "torch / ours", "min", "max"]
    print_table("optimizer step, CPU time of one thread", header, rows)
    print_json("optimizer_step", cases)


if __name__ == "__main__":
    main()
