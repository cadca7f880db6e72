"""Routing to experts against lean torch and against the bytes that must move, on one thread and on two.

Lean torch is what a careful hand writes with torch alone: softmax and topk, bincount, the two losses' sums, a stable
argsort of the T * k assignments, index_select there, index_select and a weighted sum back; autograd makes its backward
pass. Rows are [T, 1024] fp32 and experts the identity. The copy floor is the time of a streaming copy of as many bytes
as must be read and written at least: T * 1024 * 4 * (2 + 2k) forward, (2 + 3k) backward.

On one thread, time is that of the thread on the processor, which others on the machine do not lengthen; on two it is
wall time, and means little on a machine that is not idle.

glibc hands large blocks back to the kernel and page-faults them in again at every call, which would be charged to
whoever allocates more; the benchmark starts itself again with malloc told not to.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

WIDTH = 1024
SHAPES = ((8, 2), (64, 8), (256, 8))
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}


def keep_memory() -> None:
    """Starts this program again unless malloc already keeps what is freed."""
    if any(os.environ.get(name) != value for name, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})


if __name__ == "__main__":
    keep_memory()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megaforge.kernels.moe_routing import RoutingRule, moe_permute, moe_route, moe_unpermute  # noqa: E402
from tests.bench.harness import Measure, Ratio, cpu_seconds, interleaved_ratio, print_json, print_table, seconds  # noqa: E402


def lean_route(logits: Tensor, topk: int) -> tuple[Tensor, ...]:
    """Weights, experts, order of rows, counts, probability sums, z-sum."""
    number = logits.shape[1]
    values, experts = logits.topk(topk, dim=-1)
    weights = values.softmax(dim=-1)
    probability_sum = logits.softmax(dim=-1).sum(dim=0)
    z_sum = logits.logsumexp(dim=-1).square().sum()
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    return weights, experts, order, torch.bincount(flat, minlength=number), probability_sum, z_sum


def lean_rows(x: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """There and back."""
    topk = weights.shape[1]
    rows = x.index_select(0, order // topk)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    return (rows.index_select(0, back).view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class Case:
    """One shape's tensors and what is measured on them."""

    def __init__(self, tokens: int, experts: int, topk: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name = f"T={tokens} E={experts} k={topk}"
        self.rule, self.topk = RoutingRule(topk), topk
        self.logits = torch.randn(tokens, experts, generator=generator)
        self.x = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
        self.grad = torch.randn(tokens, WIDTH, generator=generator)
        self.route = moe_route(self.logits, self.rule)
        self.weights = self.route.weights.clone().requires_grad_()
        self.order = lean_route(self.logits, topk)[2]
        self.floors = [(2 + 2 * topk) * tokens, (2 + 3 * topk) * tokens]  # rows of WIDTH read or written

    def ours(self) -> None:
        rows, _ = moe_permute(self.x, self.route.position, self.order.numel())
        self._backward(moe_unpermute(rows, self.route.position, self.weights))

    def lean(self) -> None:
        self._backward(lean_rows(self.x, self.weights, self.order))

    def _backward(self, out: Tensor) -> None:
        torch.autograd.grad(out, (self.x, self.weights), self.grad)

    @torch.no_grad()
    def forward(self) -> None:
        rows, _ = moe_permute(self.x, self.route.position, self.order.numel())
        moe_unpermute(rows, self.route.position, self.weights)


def streaming_copy(rows: int) -> Callable[[], object]:
    """Reads and writes ``rows`` rows altogether, in copies of 64 MiB."""
    each = 1 << 14
    source = torch.zeros(each, WIDTH)
    position = torch.arange(each, dtype=torch.int32).unsqueeze(1)

    def copy() -> None:
        left = rows // 2
        while left > 0:
            now = min(left, each)
            moe_permute(source[:now], position[:now], now)
            left -= now

    return copy


def thread_seconds(function: Callable[[], object], repeat: int = 1) -> Measure:
    """Processor time of this thread; wall time where others help it."""
    if torch.get_num_threads() > 1:
        return seconds(function, repeat)
    return cpu_seconds(function, repeat)


def compare(candidate: Callable[[], object], peer: Callable[[], object], rounds: int, repeat: int = 1) -> Ratio:
    return interleaved_ratio(thread_seconds(candidate, repeat), thread_seconds(peer, repeat), rounds)


def speedup(ratio: Ratio) -> str:
    return f"{1 / ratio.median:.2f} [{1 / ratio.max:.2f}, {1 / ratio.min:.2f}]"


def with_threads(threads: int, function: Callable[[], object]) -> Measure:
    measure = seconds(function)

    def run() -> float:
        torch.set_num_threads(threads)
        return measure()

    return run


def measure_case(case: Case, rounds: int, cases: dict[str, dict[str, object]], threads: int) -> list[object]:
    def route() -> object:
        return moe_route(case.logits, case.rule)

    routing = compare(route, lambda: lean_route(case.logits, case.topk), rounds, 3)
    rows = compare(case.ours, case.lean, rounds)
    floor = compare(case.ours, streaming_copy(sum(case.floors)), rounds)
    forward = compare(case.forward, streaming_copy(case.floors[0]), rounds)
    key = f"{case.name} threads={threads}"
    cases[f"route {key}"] = routing.case("lean torch", milliseconds=routing.candidate * 1e3)
    cases[f"rows {key}"] = rows.case("lean torch", milliseconds=rows.candidate * 1e3)
    cases[f"rows {key} floor"] = floor.case("streaming copy of the bytes that must move")
    per_token = routing.candidate / case.x.shape[0] * 1e9
    return [
        case.name, threads, routing.candidate * 1e3, per_token, speedup(routing), rows.candidate * 1e3, speedup(rows),
        f"{floor.median:.2f} [{floor.min:.2f}, {floor.max:.2f}]", forward.median,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    args = parser.parse_args()
    table: list[list[object]] = []
    scaling: list[list[object]] = []
    cases: dict[str, dict[str, object]] = {}
    for tokens in args.tokens:
        for experts, topk in SHAPES:
            case = Case(tokens, experts, topk)
            for threads in args.threads:
                torch.set_num_threads(threads)
                table.append(measure_case(case, args.rounds, cases, threads))
            if 2 not in args.threads:
                continue
            both: list[object] = [case.name]
            for name, function in (("route", lambda case=case: moe_route(case.logits, case.rule)), ("rows", case.ours)):
                ratio = interleaved_ratio(with_threads(2, function), with_threads(1, function), args.rounds)
                cases[f"{name} {case.name} two threads"] = ratio.case("one thread")
                both.append(speedup(ratio))
            scaling.append(both)
    print_table(
        "routing and rows; 'x lean' is how many times faster than lean torch, 'of floor' time over the copy floor's",
        ["shape", "threads", "route ms", "ns/token", "x lean", "rows fwd+bwd ms", "x lean", "of floor", "fwd of floor"],
        table,
    )
    if scaling:
        print_table("two threads over one", ["shape", "route", "rows"], scaling)
    print_json("moe_routing", cases)


if __name__ == "__main__":
    main()
