"""A whole optimizer step with Muon, beside torch.optim.Muon and the published packages on the same matrices.

    bash run_scripts/bench.sh optimizer_step [--rounds 7] [--models cdrmix-tiny 100M]

The packages are measured where they are installed (``pip install --no-deps muon-optimizer==0.1.0
pytorch-optimizer==4.1.0``): Keller Jordan's muon, and pytorch_optimizer, which batches equal shapes.

Models: cdrmix-tiny, and a dense transformer of 12 layers and 768 channels. Both sides update the same matrices, fp32
with bf16 products, and all other parameters by fused AdamW. A peer gets each expert and each of q, k and v as a
parameter of its own. CPU-seconds of one thread; the ratio is the peer's over ours.
"""

from __future__ import annotations

import argparse
import importlib
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
from tests.bench.harness import cpu_seconds, interleaved_ratio, print_json, print_table

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
# A module and its class.
PEERS: dict[str, tuple[str, str]] = {
    "torch.optim": ("torch.optim", "Muon"),
    "muon": ("muon", "SingleDeviceMuon"),
    "pytorch_optimizer": ("pytorch_optimizer", "Muon"),
}


def peer_step(name: str, matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Callable[[], None]:
    """One step of the peer and of fused AdamW, on parameters of its own.

    Raises:
        ModuleNotFoundError: the peer is not installed.
    """
    module, kind = PEERS[name]
    muon_class = getattr(importlib.import_module(module), kind)
    matrices, others = ([_copy(x) for x in group] for group in (matrices, others))
    group = {"params": matrices} if module != "pytorch_optimizer" else {"params": matrices, "use_muon": True}
    muon, adamw = muon_class([group], lr=1e-3), torch.optim.AdamW(others, lr=1e-3, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    copy = nn.Parameter(parameter.detach().clone())
    assert parameter.grad is not None
    copy.grad = parameter.grad.clone()
    return copy


def make(flags: tuple[str, ...]) -> tuple[Callable[[], None], list[nn.Parameter], list[nn.Parameter]]:
    """Our step; the matrices that Muon updates, one by one; and all other parameters."""
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(parse_config(list(flags)).config.model, ctx))
    ours = Optimizer(CONFIG, model, ctx)
    matrices, others = [], []
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
        for piece in spec.pieces(ctx):
            parts = [piece.local_view(x).reshape(-1, *piece.shape[-2:]) for x in (parameter.detach(), gradient)]
            for weight, part in zip(*parts, strict=True):
                matrices.append(nn.Parameter(weight.clone()))
                matrices[-1].grad = part.clone()
    return lambda: ours.step(1e-3), matrices, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    cases = {}
    for name in arguments.models:
        ours, matrices, others = make(MODELS[name])
        millions = sum(x.numel() for x in matrices) / 1e6
        for peer in PEERS:
            try:
                theirs = peer_step(peer, matrices, others)
            except ModuleNotFoundError as error:
                print(f"{peer} is left out: {error}")
                continue
            ratio = interleaved_ratio(cpu_seconds(theirs), cpu_seconds(ours), arguments.rounds)
            times = [ratio.peer * 1e3, ratio.candidate * 1e3, ratio.median, ratio.min, ratio.max]
            rows.append([name, millions, peer, *times])
            cases[f"{name} {peer}"] = ratio.case("this over the peer's Muon and fused AdamW")
    header = ["model", "million in matrices", "peer", "ours ms", "peer ms", "peer / ours", "min", "max"]
    print_table("optimizer step, CPU time of one thread", header, rows)
    print_json("optimizer_step", cases)


if __name__ == "__main__":
    main()
