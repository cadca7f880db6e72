"""Products with packed weights on one thread against torch and, where its library is there, ggml.

All contenders of a shape run turn about; times are those of the thread on the processor. Ours take and give fp32 and
quantize each token on the way, and so do ggml and torch's dynamic quantized linear; ``_int_mm`` is the bare product of
int8 matrices. Up to 8 tokens, weights come from memory: copies of them, 128 MiB at least, are used in turn. GOP/s are
2 M N K a second; beside them stand the machine's greatest rate of byte products and what it reads from memory.

ggml is found in an installed llama-cpp-python, or in a folder with libggml-base.so and libggml-cpu.so by --ggml.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from tests.bench.ceiling import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.kernels.bitgemm import Prepared, bit_linear, native, pack, prepare
from tests.bench.ceiling import byte_products_per_second, read_bytes_per_second
from tests.bench.ggml import BLOCK, Ggml, folder_of_wheel
from tests.bench.harness import print_json, print_table

SHAPES = ("2048x2048", "4608x2048", "4096x4096", "14336x4096")
TOKENS = (1, 8, 128, 512)
COLD = 8  # tokens up to which weights are not in a cache
COLD_BYTES = 128 << 20
OURS = ("ternary", "binary", "int4")
Call = Callable[[], object]


class Contender:
    """Something that multiplies the tokens by each of its copies of the weights."""

    def __init__(self, run: Call, copies: int) -> None:
        self.run, self.copies, self.seconds = run, copies, list[float]()

    def measure(self) -> None:
        start = time.thread_time()
        self.run()
        self.seconds.append((time.thread_time() - start) / self.copies)


def over(copies: list[Tensor], product: Callable[[Tensor], object]) -> Contender:
    def run() -> None:
        for copy in copies:
            product(copy)

    return Contender(run, len(copies))


def several(weight: Tensor, tokens: int) -> list[Tensor]:
    count = max(1, -(-COLD_BYTES // weight.nbytes)) if tokens <= COLD else 1
    return [weight.clone() for _ in range(count)]


def ours(scheme: str, x: Tensor, rows: int) -> Contender:
    columns = x.shape[1]
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    weight = prepare(pack(signs.to(torch.int8), torch.tensor(0.02), scheme))
    return over(
        several(weight.panels, x.shape[0]),
        lambda panels: bit_linear(x, Prepared(panels, scheme, weight.shape, weight.scale)),
    )


def by_torch(x: Tensor, weight: Tensor) -> dict[str, Contender]:
    tokens, codes = x.shape[0], (x * 40).clamp(-127, 127).to(torch.int8)
    narrow = x.bfloat16()
    found = {
        "torch fp32": over(several(weight, tokens), lambda w: F.linear(x, w)),
        "torch bf16": over(several(weight.bfloat16(), tokens), lambda w: F.linear(narrow, w)),
        "torch _int_mm": over(
            several((weight * 50).sign().to(torch.int8), tokens), lambda w: torch._int_mm(codes, w.t())
        ),
    }
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
    quantized = torch.quantize_per_tensor(weight, 0.02, 0, torch.qint8)
    count = max(1, -(-COLD_BYTES // (weight.nbytes // 4))) if tokens <= COLD else 1
    try:
        packed = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(count)]
    except RuntimeError as error:
        print(f"torch's dynamic quantized linear is left out: {error}")
        return found
    found["torch qlinear"] = over(packed, lambda w: torch.ops.quantized.linear_dynamic(x, w))
    return found


def by_ggml(library: Ggml, x: Tensor, weight: Tensor, rounds: int) -> dict[str, Contender]:
    found = {}
    for kind, bits in (("TQ2_0", 2.0625), ("TQ1_0", 1.6875)):
        size = int(weight.numel() * bits / 8)
        copies = max(1, -(-COLD_BYTES // size)) if x.shape[0] <= COLD else 1
        run, result = library.product(weight, x, kind, copies, rounds + 1)
        run()
        want = x @ weight.t()
        error = float((result - want).norm() / want.norm())
        assert error < 0.02, f"ggml's {kind} computes something else: relative error {error}"
        found[f"ggml {kind}"] = Contender(run, copies)
    return found


def times(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    ratios = [one / other for one, other in zip(numerator, denominator, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def compare(rows: int, columns: int, tokens: int, rounds: int, library: Ggml | None) -> dict[str, Contender]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator)
    weight = torch.randint(-1, 2, (rows, columns), generator=generator) * 0.02
    contenders = {name: ours(name, x, rows) for name in OURS} | by_torch(x, weight)
    if library is not None and columns % BLOCK == 0:
        contenders |= by_ggml(library, x, weight, rounds + 1)
    for number in range(rounds + 1):
        order = list(contenders.values())
        for contender in order if number % 2 else reversed(order):
            contender.measure()
    for contender in contenders.values():
        del contender.seconds[0]
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns of the weights")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--ggml", type=Path, default=folder_of_wheel())
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "cpu" not in native.COMPILED:
        print("the CPU code is not built: plain torch is measured against itself")
    library = None if args.ggml is None else Ggml(args.ggml)
    if library is None:
        print("no ggml: pip install llama-cpp-python, or --ggml FOLDER")
    peak, read = 2e-9 * byte_products_per_second(), 1e-9 * read_bytes_per_second()
    print(f"one core: {peak:.0f} GOP/s of byte products (AVX-512 VNNI), reads {read:.1f} GB/s", flush=True)
    rates: list[list[object]] = []
    faster: list[list[object]] = []
    cases: dict[str, dict[str, object]] = {}
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        for tokens in args.tokens:
            found = compare(rows, columns, tokens, args.rounds, library)
            work = 2e-9 * tokens * rows * columns
            rate = {name: work / statistics.median(one.seconds) for name, one in found.items()}
            header = ["weights", "tokens", *found]
            rates.append([shape, tokens, *rate.values()])
            for name in OURS:
                against = {peer: times(found[peer].seconds, found[name].seconds) for peer in found if peer not in OURS}
                faster.append([shape, tokens, name, *(f"{m:.2f} ({a:.2f}-{b:.2f})" for m, a, b in against.values())])
                cases[f"{name} {shape} {tokens}"] = {
                    "ratio": round(1 / against["torch bf16"][0], 4), "peer": "torch bf16", "gops": rate[name],
                    "of_peak": rate[name] / peak if peak else None,
                    "faster": {peer: found_times[0] for peer, found_times in against.items()},
                }  # fmt: skip
            print("done:", *(f"{cell:.4g}" if isinstance(cell, float) else cell for cell in rates[-1]), flush=True)
    print_table("GOP/s", header, rates)
    print_table(
        "times faster: median (least - greatest)", ["weights", "tokens", "ours", *header[2 + len(OURS) :]], faster
    )
    print_json("bitgemm", cases)


if __name__ == "__main__":
    main()
