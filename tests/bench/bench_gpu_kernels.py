"""WKV-7 on a GPU: compiled CUDA, fla-core's Triton kernels and plain chunked torch, turn about in one process.

bf16 inputs, fp32 log decays and states, [s, b, H, 64]. Cases are sequences x length x heads, forward alone (nothing
kept) and forward + backward: the time of each and its peak memory beyond the inputs, and how many times as long as the
first implementation it takes. The machine's copy bandwidth and TF32 matrix rate are measured beside them.

    python tests/bench/bench_gpu_kernels.py [--rounds 20] [--write docs/gpu_kernels.md]
"""

from __future__ import annotations

import argparse
import datetime
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.errors import UserError
from megaforge.kernels.wkv7.backend import wkv7_backend
from tests.bench.harness import Measure, interleaved_ratio, print_json, print_table, seconds

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((8, 4096, 32), (1, 4096, 32), (1, 16384, 64), (16, 512, 12))  # b, s, H
N = 64
NAMES = ("native", "fla", "torch")
HEADER = ["b x s x H", "pass", "implementation", "ms", "times the first", "range", "peak MiB"]


def inputs(b: int, s: int, heads: int) -> list[torch.Tensor]:
    """r, log_w, k, v, a, b as an RWKV-7 layer makes them."""
    shape = (s, b, heads, N)
    r, k, v, x, rate = (torch.randn(shape, device="cuda") for _ in range(5))
    log_w = -math.exp(-0.5) * torch.sigmoid(2 * torch.randn(shape, device="cuda") - 2)
    kk = torch.nn.functional.normalize(x, dim=-1)
    six = (r, log_w, k, v, -kk, kk * torch.sigmoid(rate))
    return [(x if i == 1 else x.bfloat16()).requires_grad_() for i, x in enumerate(six)]


def forward(name: str, six: list[torch.Tensor]) -> Callable[[], object]:
    function = wkv7_backend(name, torch.device("cuda"), torch.bfloat16, N)

    def once() -> object:
        with torch.no_grad():
            return function(*six)

    return once


def forward_backward(name: str, six: list[torch.Tensor]) -> Callable[[], object]:
    function = wkv7_backend(name, torch.device("cuda"), torch.bfloat16, N)
    dy = torch.randn_like(six[3])
    return lambda: torch.autograd.grad(function(*six)[0], six, dy)


def on_gpu(function: Callable[[], object]) -> Measure:
    def finished() -> None:
        function()
        torch.cuda.synchronize()

    return seconds(finished)


def peak(function: Callable[[], object]) -> float:
    """MiB that one call takes at most besides what is there."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def runnable() -> list[str]:
    """The implementations that are here; says why the others are not."""
    found = []
    for name in NAMES:
        try:
            wkv7_backend(name, torch.device("cuda"), torch.bfloat16, N)
            found.append(name)
        except UserError as error:
            print(f"without {name}: {error}")
    return found


def ceiling() -> str:
    """The device's copy bandwidth and TF32 matrix rate, measured."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    copy, product = on_gpu(lambda: target.copy_(source)), on_gpu(lambda: matrix @ matrix)
    copies, products = ([measure() for _ in range(20)] for measure in (copy, product))
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth, rate = 2 * source.numel() / min(copies) / 1e9, 2 * 4096**3 / min(products) / 1e12
    return f"copies {bandwidth:.0f} GB/s, TF32 {rate:.0f} TFLOP/s"


def machine() -> str:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}, "
        f"commit {commit.stdout.strip() or 'unknown'}; {ceiling()}"
    )


def measure_case(shape: tuple[int, int, int], rounds: int, names: list[str]) -> tuple[list[list[object]], dict]:
    """Rows of the table, and the JSON cases, of one shape."""
    rows: list[list[object]] = []
    cases = {}
    label = " x ".join(map(str, shape))
    six = inputs(*shape)
    for title, make in (("fwd", forward), ("fwd+bwd", forward_backward)):
        functions = {name: make(name, six) for name in names}
        for name in names:
            ratio = interleaved_ratio(on_gpu(functions[name]), on_gpu(functions[names[0]]), rounds, warmup=3)
            spread = f"{ratio.min:.2f}-{ratio.max:.2f}"
            rows.append([label, title, name, 1e3 * ratio.candidate, ratio.median, spread, peak(functions[name])])
            if name != names[0]:
                cases[f"{label} {title} {name}"] = ratio.case(names[0], ms=round(1e3 * ratio.candidate, 4))
    return rows, cases


def write(path: Path, about: str, rows: list[list[object]]) -> None:
    """The table as a page of documentation."""
    command = "bash run_scripts/bench.sh gpu_kernels --write docs/gpu_kernels.md"
    lines = ["# Kernels on a GPU", "", f"Written by `{command}`."]
    lines += ["", "## WKV-7", "", f"{about}.", "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table as Markdown")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench gpu_kernels: torch sees no CUDA device; nothing measured")
        return
    names = runnable()
    about = machine()
    print(about)
    rows: list[list[object]] = []
    cases: dict = {}
    for shape in SHAPES:
        more, found = measure_case(shape, args.rounds, names)
        rows += more
        cases |= found
    print_table("WKV-7", HEADER, rows)
    if args.write:
        write(args.write, about, rows)
    print_json("gpu_kernels", cases)


if __name__ == "__main__":
    main()
