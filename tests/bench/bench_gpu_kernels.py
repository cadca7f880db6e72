"""Kernels on a GPU, turn about in one process.

WKV-7: compiled CUDA, the same where states of every 16 tokens are kept, fla-core's Triton kernels and plain chunked
torch.

bf16 inputs, fp32 log decays and states, [s, b, H, 64]. Cases are sequences x length x heads, forward alone (nothing
kept) and forward + backward: the time of each and its peak memory beyond the inputs, and how many times as long as the
first implementation it takes. The machine's copy bandwidth and TF32 matrix rate are measured beside them.

Pointwise: the arithmetic around WKV-7, norms, activations, rotations, the head's cross-entropy, forward + backward: the
Triton kernels, the same in plain torch, and the definition through torch.compile.

Newton-Schulz, five steps of normalised bf16 matrices: compiled CUDA (wgmma where it is there, mma.sync), cuBLAS in a
batch, and torch.optim.Muon's own function, matrix by matrix.

The head and its loss, whose gradients are formed in the forward pass or later, and norms of many gradients.

Products with packed weights: every form of the compiled code, torch's bf16 and raw int8 products; bf16 tokens x rows x
columns. A call is 16 layers of different weights, which caches do not hold, in one CUDA graph.

    python tests/bench/bench_gpu_kernels.py [--rounds 20] [--only pointwise] [--write docs/gpu_kernels.md]

Without a GPU it measures nothing; --dry makes every pointwise call once on small tensors, with TRITON_INTERPRET=1 in
Triton's interpreter too.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.optim._muon import _zeropower_via_newtonschulz

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.errors import UserError
from megaforge.kernels import bitgemm
from megaforge.kernels.bitgemm import cuda as packed_products
from megaforge.kernels.newton_schulz import cuda
from megaforge.kernels.wkv7.backend import wkv7_backend
from tests.bench.gpu_pointwise import all_calls, why_no_triton
from tests.bench.gpu_step import step_calls
from tests.bench.harness import Measure, interleaved_ratio, print_json, print_table, seconds

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((8, 4096, 64), (8, 4096, 32), (1, 4096, 32), (1, 16384, 64), (16, 512, 12))  # b, s, H
N = 64
PLAIN_TORCH = 2**20  # tokens times heads
NAMES = ("native", "native16", "fla", "torch")
POINTWISE_SHAPES = ((8, 4096, 32), (1, 4096, 12))  # b, s, H
LOGITS = (8192, 65536)  # rows, columns
PARTS = ("wkv7", "newton_schulz", "packed", "step", "pointwise")
MATRICES = ((1, 1024, 1024), (1, 4096, 4096), (1, 8192, 8192), (1, 2048, 8192), (24, 512, 512), (8, 2048, 2048))
PACKED_SHAPES = tuple((m, n, k) for n, k in ((4096, 4096), (4096, 14336)) for m in (1, 8, 32, 64, 128, 512, 2048))
SCHEMES = ("binary", "ternary", "int4")
LAYERS = 16  # of a call
QUINTIC = (3.4445, -4.7750, 2.0315)
HEADER = ["shape", "what", "implementation", "ms", "times the first", "range", "peak MiB"]


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


def cublas_steps(x: torch.Tensor) -> torch.Tensor:
    for a, b, c in [QUINTIC] * 5:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def muon_steps(x: torch.Tensor) -> object:
    return [_zeropower_via_newtonschulz(one, QUINTIC, 5, 1e-7) for one in x]


def orthogonalizations(shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """Five steps of matrices [b, m, n] by each implementation that is here."""
    x = torch.randn(shape, device="cuda")
    x = (x / x.norm(dim=(1, 2), keepdim=True)).bfloat16()
    ways = {"wgmma": True, "mma": False} if cuda.has_wgmma(x.device) else {"mma": False}
    ours = {name: partial(cuda.steps_by_cuda, x, [QUINTIC] * 5, wgmma) for name, wgmma in ways.items()}
    others = {"cublas": partial(cublas_steps, x), "torch.optim.Muon": partial(muon_steps, x)}
    return {**(ours if cuda.takes(x) else {}), **others}


def graphed(layers: list[Callable[[], object]]) -> Callable[[], object]:
    """One call of all of them, without the host's time."""
    for layer in layers:
        layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer()
    return graph.replay


def random_codes(scheme: str, rows: int, columns: int) -> torch.Tensor:
    least, most = bitgemm.reference.RANGES[scheme]
    codes = torch.randint(least, most + 1, (rows, columns), device="cuda", dtype=torch.int8)
    return codes.where(codes != 0, 1) if scheme == "binary" else codes


def packed_layers(scheme: str, m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    """LAYERS products [m, k] x [n, k] with packed weights, by each form that is there."""
    x, scale, bits = torch.randn(m, k, device="cuda").bfloat16(), torch.ones((), device="cuda"), bitgemm.BITS[scheme]
    weights = [bitgemm.prepare(bitgemm.pack(random_codes(scheme, n, k), scale, scheme)) for _ in range(LAYERS)]
    forms = ["gemv"] * (m <= 8) + ["stream"] * (m <= 64) + ["mma"]
    forms += ["wgmma"] * (m > 8 and packed_products.has_wgmma(x.device))
    return {
        form: graphed(
            [partial(packed_products.linear_by, form, x, w.panels, scale, None, (n, k), bits) for w in weights]
        )
        for form in forms
    }


def dense_layers(m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    """The same by torch: bf16, and int8 without quantizing (for more than 16 tokens, as torch has it)."""
    x, weights = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(LAYERS, n, k, device="cuda").bfloat16()
    found = {"torch bf16": graphed([partial(torch.nn.functional.linear, x, w) for w in weights])}
    if m > 16:
        x8, w8 = x.to(torch.int8), weights.to(torch.int8)
        found["torch int8"] = graphed([partial(torch._int_mm, x8, w.t()) for w in w8])
    return found


def add_packed(add: Callable[..., None]) -> None:
    """Rows of all schemes; the first of each is torch's bf16 product."""
    if "cuda" not in packed_products.COMPILED:
        print("without packed products: megaforge.kernels._bitgemm_cuda is not built, or MEGAFORGE_NATIVE=0")
        return
    for m, n, k in PACKED_SHAPES:
        for scheme in SCHEMES:
            add(f"{m} x {n} x {k}", f"{LAYERS} {scheme}", {**dense_layers(m, n, k), **packed_layers(scheme, m, n, k)})


def compare(label: str, what: str, functions: dict[str, Callable[[], object]], rounds: int) -> tuple[list, dict]:
    """Rows of the table, and the JSON cases: everything against the first of ``functions``."""
    rows, cases = [], {}
    first = next(iter(functions))
    for name, function in functions.items():
        ratio = interleaved_ratio(on_gpu(function), on_gpu(functions[first]), rounds, warmup=3)
        spread = f"{ratio.min:.2f}-{ratio.max:.2f}"
        rows.append([label, what, name, 1e3 * ratio.candidate, ratio.median, spread, peak(function)])
        if name != first:
            cases[f"{label} {what} {name}"] = ratio.case(first, ms=round(1e3 * ratio.candidate, 4))
    return rows, cases


Add = Callable[..., None]


def add_wkv7(add: Add) -> None:
    names = runnable()
    for shape in SHAPES:
        six, label = inputs(*shape), " x ".join(map(str, shape))
        # Plain torch keeps too much of the largest for 80 GB.
        here = [name for name in names if name != "torch" or math.prod(shape) <= PLAIN_TORCH]
        add(label, "WKV-7 fwd", {name: forward(name, six) for name in here})
        add(label, "WKV-7 fwd+bwd", {name: forward_backward(name, six) for name in here})


def add_newton_schulz(add: Add) -> None:
    if "cuda" not in cuda.COMPILED:
        print(
            "without compiled Newton-Schulz: megaforge.kernels._newton_schulz_cuda is not built, or MEGAFORGE_NATIVE=0"
        )
    for matrices in MATRICES:
        add(" x ".join(map(str, matrices)), "Newton-Schulz", orthogonalizations(matrices))


def add_pointwise(add: Add) -> None:
    if why := why_no_triton():
        print(f"without Triton kernels of pointwise operators: {why}")
    for (label, what), make in all_calls(POINTWISE_SHAPES, LOGITS, "cuda", not why, True).items():
        add(label, what, make())


def dry() -> None:
    """Every call of the parts pointwise and step, once and on small tensors."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for (label, what), make in all_calls([(2, 5, 2)], (3, 70), "cpu", interpreted, False).items():
        for name, function in make().items():
            function()
            print(f"{label}: {what} by {name} runs")
    for label, what, functions in step_calls("cpu", [(5, 4, 8)], [(3, 10)]):
        for name, function in functions.items():
            function()
            print(f"{label}: {what} by {name} runs")


def add_step(add: Callable[..., None]) -> None:
    for row in step_calls():
        add(*row)


def measured(rounds: int, parts: Sequence[str]) -> tuple[list[list[object]], dict]:
    rows: list[list[object]] = []
    cases: dict = {}

    def add(*arguments: object) -> None:
        more, found = compare(*arguments, rounds)
        rows.extend(more)
        cases.update(found)

    adders = {
        "wkv7": add_wkv7, "newton_schulz": add_newton_schulz, "packed": add_packed, "pointwise": add_pointwise,
        "step": add_step,
    }  # fmt: skip
    for part in parts:
        adders[part](add)
    return rows, cases


def write(path: Path, about: str, rows: list[list[object]]) -> None:
    """The table as a page of documentation."""
    command = "bash run_scripts/bench.sh gpu_kernels --write docs/gpu_kernels.md"
    lines = ["# Kernels on a GPU", "", f"Written by `{command}`."]
    lines += ["", f"{about}.", "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--dry", action="store_true", help="measure nothing: make every pointwise call once, on a CPU")
    args = parser.parse_args()
    if args.dry:
        dry()
        return
    if not torch.cuda.is_available():
        print("bench gpu_kernels: torch sees no CUDA device; nothing measured")
        return
    about = machine()
    print(about)
    rows, cases = measured(args.rounds, args.only)
    print_table("Kernels", HEADER, rows)
    if args.write:
        write(args.write, about, rows)
    print_json("gpu_kernels", cases)


if __name__ == "__main__":
    main()
