"""Generation on a CPU, token by token, beside BlinkDL's rwkv package on the same weights.

    python tests/bench/bench_generate.py [--threads 2] [--rounds 7] [--batch 1 8]

RWKV-7 of 12 layers, 768 wide, with 65,536 tokens (562 MB in fp32) and random weights, as published files have them. A
round is a few tokens of each program, turn about; the package has no batches, and a batch is compared with its one
text. Time to the first token is that of a prompt.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.checkpoint.import_rwkv7 import import_rwkv7
from megaforge.checkpoint.published_import import Import
from megaforge.inference.restore import load_trained_model
from tests.bench.ceiling import read_bytes_per_second
from tests.bench.harness import print_json, print_table
from tests.checkpoint.rwkv7_weights import published_weights

PEER = "rwkv fp32"
Step = Callable[[], None]


def ours(path: Path, dtype: str, batch: int, prompt: torch.Tensor) -> tuple[Step, Step]:
    """One more token of ``batch`` texts, and a prompt read from nothing."""
    model = load_trained_model(str(path), device="cpu", dtype=dtype).model
    state = model.new_state()
    last = torch.arange(batch).unsqueeze(1) + 1

    def token() -> None:
        nonlocal last
        scores = model.logits(last, state)
        assert scores is not None
        last = scores.argmax(-1, keepdim=True)

    return token, lambda: void(model.logits(prompt.unsqueeze(0), model.new_state()))


def package(path: Path, dtype: str, prompt: torch.Tensor) -> tuple[Step, Step]:
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV

    model = RWKV(str(path.with_suffix("")), f"cpu {dtype}")
    last, state = 1, None

    @torch.no_grad()
    def token() -> None:
        nonlocal last, state
        scores, state = model.forward([last], state)
        last = int(scores.argmax())

    return token, torch.no_grad()(lambda: void(model.forward(prompt.tolist(), None)))


def void(_: object) -> None:
    """Drops a result."""


def seconds(step: Step, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4, help="of a round")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    options = parser.parse_args()
    if importlib.util.find_spec("rwkv") is None:
        sys.exit("rwkv is not installed: pip install --no-deps rwkv==0.8.32")
    torch.set_num_threads(options.threads)
    prompt = torch.randint(0, options.vocab, (options.prompt,), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        ranks = {"w": 64, "a": 64, "v": 32, "g": 128}
        weights = published_weights(0, options.vocab, options.width, options.layers, 4 * options.width, ranks)
        torch.save(weights, path)
        size = (
            sum(value.nbytes for value in weights.values()) - weights["emb.weight"].nbytes
        )  # of a row of it one is read
        del weights
        steps = {PEER: package(path, "fp32", prompt), "rwkv bf16": package(path, "bf16", prompt)}
        import_rwkv7(Import(path, Path(folder) / "ours"))
        for dtype in ("fp32", "bf16"):
            for batch in options.batch:
                steps[f"ours {dtype}, batch {batch}"] = ours(Path(folder) / "ours", dtype, batch, prompt)
        times: dict[str, list[float]] = {name: [] for name in steps}
        first: dict[str, float] = {}
        for number in range(options.rounds + 1):
            for name in sorted(steps, reverse=bool(number % 2)):
                took = seconds(steps[name][0], options.tokens)
                if number:
                    times[name].append(took)
        for name, (_, read) in steps.items():
            first[name] = seconds(read, 1)
    rows: list[list[object]] = []
    cases = {}
    for name, took in times.items():
        texts = int(name.rsplit(" ", 1)[1]) if "batch" in name else 1
        ratios = [texts * theirs / own for own, theirs in zip(took, times[PEER], strict=True)]
        median = statistics.median(ratios)
        speed = (size / (2 if "bf16" in name else 1)) / statistics.median(took) / 1e9
        spread = f"{median:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        rows.append([name, texts / statistics.median(took), f"{speed:.1f}", spread, first[name]])
        cases[name] = {
            "ratio": round(median, 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
            "peer": PEER,
        }
    read = read_bytes_per_second() / 1e9
    print_table(
        f"{options.threads} threads; one thread reads {read:.1f} GB/s",
        ["program", "tokens/s", "GB/s", f"x {PEER}", f"seconds to the first token of {options.prompt}"],
        rows,
    )
    print_json("generate", cases)


if __name__ == "__main__":
    main()
