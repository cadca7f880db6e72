"""WKV-7 on a CPU: the compiled operator against flash-linear-attention's recurrence, our torch forms and the machine.

Width 512 (8 heads of 64 channels), fp32. Rates are tokens a CPU-second on one thread, so that a machine that others use
too can be measured; "two threads" are tokens a second of wall time, two against one.

Cases:
    fla_recurrence   forward and backward against fla-core's dplr_recurrence. Goal 40.
    chunked          the same against our portable chunked path. Goal 5.
    recurrent        the same against our token-by-token definition.
    forward_ceiling  the forward pass's multiply-adds (5 N^2 a token and head) against those of a loop that does nothing
                     else. Goal 0.65.
    backward_ceiling forward and backward together, 18 N^2 a token and head, against the same loop.
    two_threads      Best against best of some seconds of each, turn about: on a machine that others use, the moments
                     in which both cores are free. Goal 1.8.

    python tests/bench/bench_wkv7.py [--rounds 5] [--length 512] [--batch 4]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.kernels.wkv7 import wkv7_chunked, wkv7_recurrent
from megaforge.kernels.wkv7.native import COMPILED, wkv7_native
from tests.bench.ceiling import describe, keep_freed_memory, multiply_adds_per_second
from tests.bench.harness import Ratio, interleaved_ratio, print_json, print_table
from tests.kernels.wkv7_cases import make_inputs

HEADS, N = 8, 64
Function = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fla() -> Function:
    """fla-core's dplr_recurrence, called as wkv7. Its file alone: importing the package would ask for Triton."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("this benchmark needs fla-core: pip install --no-deps fla-core==0.6.0 and pip install einops")
    path = f"{found.submodule_search_locations[0]}/ops/generalized_delta_rule/dplr/naive.py"
    spec = importlib.util.spec_from_file_location("fla_dplr_naive", path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def recurrence(r, log_w, k, v, a, b, state=None):
        r, log_w, k, v, a, b = (x.permute(1, 2, 0, 3) for x in (r, log_w, k, v, a, b))
        y, state = module.dplr_recurrence(r * N**0.5, k, v, a, b, log_w)
        return y.permute(2, 0, 1, 3), state.transpose(-1, -2)

    return recurrence


class Subject:
    """A form of WKV-7 and inputs for it."""

    def __init__(self, function: Function, length: int, batch: int) -> None:
        self.function, self.tokens = function, length * batch
        self.inputs = [x.float().requires_grad_() for x in make_inputs(length, batch=batch, heads=HEADS, n=N)[:6]]
        self.dy = torch.randn(length, batch, HEADS, N)

    def forward(self) -> None:
        with torch.no_grad():
            self.function(*self.inputs)

    def both(self) -> None:
        y, _ = self.function(*self.inputs)
        torch.autograd.grad(y, self.inputs, self.dy)

    def rate(self, run: Callable[[], None], clock: Callable[[], float], seconds: float = 0.25) -> Callable[[], float]:
        """Tokens a second of ``clock``, the best of the runs that fit into about so many seconds."""

        def measure() -> float:
            best, end = 0.0, time.perf_counter() + seconds
            while best == 0 or time.perf_counter() < end:
                start = clock()
                run()
                best = max(best, self.tokens / (clock() - start))
            return best

        return measure


def two_threads(subject: Subject, rounds: int) -> Ratio:
    def on(threads: int) -> Callable[[], float]:
        measure = subject.rate(subject.both, time.perf_counter, 0.05)
        seen = [0.0]

        def run() -> float:
            torch.set_num_threads(threads)
            seen.append(max(seen[-1], measure()))  # the best so far
            return seen[-1]

        return run

    ratio = interleaved_ratio(on(2), on(1), 20 * rounds, warmup=10 * rounds)
    torch.set_num_threads(1)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured pairs a case")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    arguments = parser.parse_args()
    keep_freed_memory()
    if "cpu" not in COMPILED:
        raise SystemExit("WKV-7's compiled code is missing: pip install --no-build-isolation -e .")
    torch.set_num_threads(1)
    native = Subject(wkv7_native, arguments.length, arguments.batch)
    clock, rounds = time.process_time, arguments.rounds
    ours = native.rate(native.both, clock)
    rows: list[list[object]] = []
    cases = {}

    def report(name: str, ratio: Ratio, peer: str, goal: float | None) -> None:
        rows.append([name, ratio.candidate, ratio.peer, ratio.median, ratio.min, ratio.max, goal or "-"])
        cases[name] = ratio.case(peer)

    for name, function, goal, words in (
        ("fla_recurrence", fla(), 40.0, "fla-core dplr_recurrence"),
        ("chunked", wkv7_chunked, 5.0, "our chunked torch path"),
        ("recurrent", wkv7_recurrent, None, "our token-by-token torch form"),
    ):
        peer = Subject(function, arguments.length, arguments.batch)
        report(name, interleaved_ratio(ours, peer.rate(peer.both, clock), rounds), words, goal)
    for name, run, slots, goal in (
        ("forward_ceiling", native.forward, 5, 0.65),
        ("backward_ceiling", native.both, 18, None),
    ):
        work = HEADS * slots * N * N
        ceiling = lambda work=work: multiply_adds_per_second() / work  # noqa: E731
        report(name, interleaved_ratio(native.rate(run, clock), ceiling, rounds), "a loop of multiply-adds", goal)
    report("two_threads", two_threads(native, rounds), "one thread, wall time", 1.8)
    print(describe())
    title = f"WKV-7, {arguments.batch} x {arguments.length} tokens, {HEADS} heads of {N}, fp32, tokens/s"
    print_table(title, ["case", "ours", "peer", "ratio", "min", "max", "goal"], rows)
    print_json("wkv7", cases)


if __name__ == "__main__":
    main()
