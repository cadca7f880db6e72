"""Newton-Schulz iterations on CPUs against torch, on one thread and on two.

The peer of bf16 is ``torch.optim.Muon``'s own function; for batches the better of a loop over it and of the same with
``torch.baddbmm``. The peers of fp32 are the same products in fp32 with torch's default and with the precision 'medium',
which on some CPUs means bf16. Beside each ratio (times faster) stand the relative error against fp64 and the greatest
singular value, ours and the peer's, for Gaussian matrices (of a batch: for its first).

On one thread, time is that of the thread on the processor; on two it is wall time, and means little on a machine that
is not idle. malloc is told to keep what is freed, so that nobody pays for page faults.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable

from tests.bench.bench_moe_routing import keep_memory

if __name__ == "__main__":
    keep_memory()

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from megaforge.kernels.newton_schulz import coefficients, newton_schulz, reference
from tests.bench.bench_moe_routing import speedup, with_threads
from tests.bench.harness import cpu_seconds, interleaved_ratio, print_json, print_table

SQUARE = ((512, 512), (1024, 1024), (2048, 2048), (1024, 2304), (8, 512, 1152), (24, 512, 512))
LONG = ((512, 2048), (1024, 4096))
TRIPLE = coefficients("simple", 1)[0]
STEPS = coefficients("simple", 5)
Call = Callable[[], object]


def theirs_loop(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return _zeropower_via_newtonschulz(x, TRIPLE, 5, 1e-7)
    return torch.stack([_zeropower_via_newtonschulz(one, TRIPLE, 5, 1e-7) for one in x])


def theirs_batched(x: Tensor) -> Tensor:
    """As a careful hand writes it: no float64, no second pass."""
    x = x.bfloat16()
    return reference.standard(x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7), STEPS)


def theirs_fp32(x: Tensor, precision: str) -> Tensor:
    torch.set_float32_matmul_precision(precision)
    stack = x if x.dim() == 3 else x.unsqueeze(0)
    stack = stack / stack.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    result = reference.standard(stack, STEPS) if x.dim() == 3 else loop_fp32(stack[0])
    torch.set_float32_matmul_precision("highest")
    return result


def loop_fp32(x: Tensor) -> Tensor:
    for a, b, c in STEPS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Compared:
    """One shape: what is measured on it, and the rows and cases that come of it."""

    def __init__(self, shape: tuple[int, ...], rounds: int) -> None:
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.name = "x".join(map(str, shape))
        self.rounds = rounds
        work = math.prod(shape) * min(shape[-2:])
        self.repeat = max(1, min(10, (1 << 29) // work))
        one = self.x if self.x.dim() == 2 else self.x[0]
        self.want = reference.standard(reference.normalize(one.double().unsqueeze(0), 1e-7), STEPS)[0]
        self.rows: list[list[object]] = []
        self.cases: dict[str, dict[str, object]] = {}

    def ours(self, precision: str, algorithm: str) -> Call:
        return lambda: newton_schulz(self.x, coefficient_type="simple", precision=precision, algorithm=algorithm)

    def against(self, kind: str, ours: Call, peers: dict[str, Call]) -> float:
        """Of the best peer; the ratio to it, as times faster."""
        best: tuple[float, str, object] | None = None
        for name, peer in peers.items():
            ratio = interleaved_ratio(cpu_seconds(ours, self.repeat), cpu_seconds(peer, self.repeat), self.rounds)
            if best is None or ratio.median > best[0]:
                best = (ratio.median, name, ratio)
        assert best is not None
        _, name, ratio = best
        quality = [*self.quality(ours()), *self.quality(peers[name]())]
        self.rows.append([self.name, kind, name, ratio.candidate * 1e3, speedup(ratio), *quality])
        self.cases[f"{kind} {self.name}"] = ratio.case(
            name, milliseconds=ratio.candidate * 1e3, error=quality[0], largest=quality[1], peer_error=quality[2],
            peer_largest=quality[3],
        )  # fmt: skip
        return 1 / ratio.median

    def quality(self, result: object) -> tuple[float, float]:
        assert isinstance(result, Tensor)
        one = (result if self.x.dim() == 2 or result.dim() == 2 else result[0]).double()
        one = one.squeeze(0)
        error = float((one - self.want).norm() / self.want.norm())
        return error, float(torch.linalg.eigvalsh(one @ one.T)[-1].clamp(min=0).sqrt())

    def bf16_peers(self) -> dict[str, Call]:
        peers: dict[str, Call] = {"torch.optim.Muon": lambda: theirs_loop(self.x)}
        if self.x.dim() == 3:
            peers["baddbmm"] = lambda: theirs_batched(self.x)
        return peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--largest", type=int, default=2048, help="leave out matrices with a longer short side")
    parser.add_argument("--kinds", nargs="+", default=["bf16", "long", "fp32", "threads"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    cases: dict[str, dict[str, object]] = {}
    faster: dict[str, list[float]] = {}
    for kind in args.kinds:
        for shape in LONG if kind == "long" else SQUARE[:3] + LONG if kind == "fp32" else SQUARE:
            if min(shape[-2:]) > args.largest:
                continue
            compared = Compared(shape, args.rounds)
            if kind == "bf16":
                found = compared.against(kind, compared.ours("bf16", "standard"), compared.bf16_peers())
                faster.setdefault(kind, []).append(found)
            elif kind == "long":
                found = compared.against(kind, compared.ours("split", "gram"), compared.bf16_peers())
                faster.setdefault(kind, []).append(found)
            elif kind == "fp32":
                for precision in ("highest", "medium"):
                    peer = {f"torch {precision}": lambda p=precision, x=compared.x: theirs_fp32(x, p)}
                    label = f"fp32 {precision}"
                    found = compared.against(label, compared.ours("fp32", "auto"), peer)
                    faster.setdefault(label, []).append(found)
            else:
                ours = compared.ours("bf16", "standard")
                ratio = interleaved_ratio(with_threads(2, ours), with_threads(1, ours), args.rounds)
                torch.set_num_threads(1)
                compared.rows.append(
                    [compared.name, "two threads", "one", ratio.candidate * 1e3, speedup(ratio), "", "", "", ""]
                )
                compared.cases[f"two threads {compared.name}"] = ratio.case("one thread")
            for row in compared.rows:
                print("done:", row[0], row[1], row[4], flush=True)
            rows += compared.rows
            cases.update(compared.cases)
    header = ["shape", "way", "peer", "ms", "times faster", "error", "max sv", "its error", "its max sv"]
    print_table("Newton-Schulz, five steps", header, rows)
    for kind, found in faster.items():
        print(f"{kind}: geometric mean {statistics.geometric_mean(found):.2f}, least {min(found):.2f}")
    print_json("newton_schulz", cases)


if __name__ == "__main__":
    main()
