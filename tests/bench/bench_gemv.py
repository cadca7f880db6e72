"""Products of a matrix with 1 to 8 vectors against torch's, matrices read from memory each time.

    python tests/bench/bench_gemv.py [--rounds 7] [--threads 1]

The speed is that of the matrix's bytes, beside what this machine reads in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.kernels.gemv import gemv, is_compiled
from tests.bench.ceiling import read_bytes_per_second
from tests.bench.harness import interleaved_ratio, print_json, print_table, seconds

SHAPES = ((768, 768), (3072, 768), (65536, 768), (2048, 2048), (8192, 2048), (2048, 8192))
BEYOND_CACHES = 300 << 20  # bytes that the matrices of a case take together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vectors", nargs="+", type=int, default=[1, 2, 4, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not is_compiled("cpu"):
        sys.exit("gemv is not compiled here: pip install --no-build-isolation -e .")
    torch.manual_seed(0)
    rows: list[list[object]] = []
    cases = {}
    for dtype, (n, k) in itertools.product((torch.float32, torch.bfloat16), SHAPES):
        size = n * k * dtype.itemsize
        matrices = [torch.randn(n, k).to(dtype) for _ in range(max(1, BEYOND_CACHES // size))]
        turns = itertools.cycle(matrices)
        repeat = max(1, min(len(matrices), 20))
        for vectors in options.vectors:
            x = torch.randn(vectors, k).to(dtype)
            with torch.no_grad():
                ratio = interleaved_ratio(
                    seconds(lambda x=x, turns=turns: gemv(x, next(turns)), repeat),
                    seconds(lambda x=x, turns=turns: F.linear(x, next(turns)), repeat),
                    options.rounds,
                )
            speed = size / ratio.candidate / 1e9
            name = f"{str(dtype)[6:]} {n}x{k} M{vectors}"
            rows.append([name, f"{ratio.median:.3f} ({ratio.min:.3f}-{ratio.max:.3f})", f"{speed:.1f}"])
            cases[name] = ratio.case("torch F.linear", gigabytes_per_second=round(speed, 1))
    ceiling = read_bytes_per_second() / 1e9
    print_table(
        f"time over F.linear's, {options.threads} threads; this machine reads {ceiling:.1f} GB/s a thread",
        ["matrix", "ratio", "GB/s"],
        rows,
    )
    print_json("gemv", cases)


if __name__ == "__main__":
    main()
