"""Causal attention on CPUs against torch's fused kernel of the same type, forward and backward, shape by shape.

Whole sequences, and documents of about 300 tokens, for which torch needs a mask of length x length and computes its
hidden part, too. Inputs are laid out as attention layers have them, [s, b, heads, d]. Beside each ratio (times faster)
stand the rate in GFLOP/s, of which the forward pass needs 4 d and the backward pass 10 d for each pair of a query and a
key that it sees, and how far the results are from fp64, as a ratio to torch's distance.

On one thread, time is that of the thread on the processor; on two it is wall time, and means little on a machine that
is not idle. malloc is told to keep what is freed, so that nobody pays for page faults.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.bench_moe_routing import keep_memory

if __name__ == "__main__":
    keep_memory()

import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.kernels.attention import causal_attention, native
from megaforge.kernels.attention.segments import documents_of, segments_of
from tests.bench.bench_moe_routing import speedup, thread_seconds
from tests.bench.harness import interleaved_ratio, print_json, print_table


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    groups: int
    length: int
    width: int
    document: int | None = None

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.groups else f"{self.heads}/{self.groups}"
        documents = f" documents of {self.document}" if self.document else ""
        return f"B{self.batch} H{heads} T{self.length} d{self.width}{documents}"


SHAPES = (
    Shape(4, 8, 8, 512, 64), Shape(1, 8, 8, 2048, 64), Shape(1, 16, 16, 4096, 64), Shape(4, 8, 8, 2048, 64, 300),
    Shape(4, 4, 4, 512, 128), Shape(1, 16, 4, 2048, 128),
)  # fmt: skip


class Compared:
    """The tensors of one shape and type."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = (shape.heads, shape.groups, shape.groups, shape.heads)
        rows = [torch.randn(shape.length, shape.batch, n, shape.width, generator=generator) for n in counts]
        *self.qkv, self.direction = (x.to(dtype).permute(1, 2, 0, 3) for x in rows)
        for x in self.qkv:
            x.requires_grad_()
        self.grouped = shape.heads != shape.groups
        ids = (torch.arange(shape.length) // (shape.document or shape.length)).expand(shape.batch, -1)
        places = range(shape.length)
        self.segments = segments_of(documents_of(ids), places, places)
        self.mask = (ids[:1, :, None] == ids[:1, None, :]).tril()[:, None] if shape.document else None
        lengths = self.segments[:, 4].double()
        self.work = float((lengths * (lengths + 1) / 2).sum()) * shape.heads * shape.width * 2

    def ours(self) -> Tensor:
        return causal_attention(*self.qkv, segments=self.segments)

    def torchs(self, qkv: list[Tensor] | None = None) -> Tensor:
        causal = self.mask is None
        return F.scaled_dot_product_attention(
            *(qkv or self.qkv), attn_mask=self.mask, is_causal=causal, enable_gqa=self.grouped
        )

    def both(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, self.qkv, self.direction)]

    def further_off(self) -> float:
        """Our distance from fp64 over torch's, of the output and the gradients together."""
        wide = [x.detach().double().requires_grad_() for x in self.qkv]
        out = self.torchs(wide)
        exact = [out.detach(), *torch.autograd.grad(out, wide, self.direction.double())]
        far = [
            sum(float((x - y).norm() / y.norm()) for x, y in zip(self.both(way), exact, strict=True))
            for way in (self.ours, self.torchs)
        ]
        return far[0] / far[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--longest", type=int, default=4096, help="leave out longer sequences")
    args = parser.parse_args()
    if "cpu" not in native.COMPILED:
        raise SystemExit("the compiled attention is not built: pip install --no-build-isolation -e .")
    torch.set_num_threads(args.threads)
    rows: list[list[object]] = []
    cases: dict[str, dict[str, object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for shape in (one for one in SHAPES if one.length <= args.longest):
            it = Compared(shape, dtype)
            name = f"{str(dtype).removeprefix('torch.')} {shape}"
            with torch.no_grad():
                forward = interleaved_ratio(thread_seconds(it.ours), thread_seconds(it.torchs), args.rounds)
            both = interleaved_ratio(
                thread_seconds(lambda it=it: it.both(it.ours)),
                thread_seconds(lambda it=it: it.both(it.torchs)),
                args.rounds,
            )
            rates = [2 * it.work / forward.candidate / 1e9, 7 * it.work / both.candidate / 1e9]
            error = it.further_off()
            rows.append([name, speedup(forward), speedup(both), both.candidate * 1e3, *rates, error])
            cases[f"forward {name}"] = forward.case("torch's SDPA", milliseconds=forward.candidate * 1e3)
            cases[f"both {name}"] = both.case("torch's SDPA", milliseconds=both.candidate * 1e3, error=error)
            print("done:", *rows[-1][:3], flush=True)
    header = ["shape", "forward, times faster", "both", "ms both", "GF/s forward", "GF/s both", "error / its error"]
    print_table(f"Causal attention, {args.threads} thread(s)", header, rows)
    print_json("attention", cases)


if __name__ == "__main__":
    main()
