"""What its recurrence costs a whole layer, RWKV-7, Mamba-2 or Routing Mamba: the layer as it is against the same layer
without the recurrence.

One block (mixer, dense FFN, their norms) of width 512 in fp32, forward and backward. "Without" passes the values on in
place of the recurrence's output; everything else stays. Ratios of tokens a CPU-second on one thread; 0.88 is the goal
for WKV-7: it may take 12 %. The same with the portable torch path is shown beside it. Mamba-2's recurrence is plain
torch everywhere; Routing Mamba has 4 experts, of which a token goes to 2.

    python tests/bench/bench_layer.py [--layers R M O] [--rounds 5] [--lengths 512 1024 2048] [--batch 4]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.model_config import ModelConfig
from megaforge.kernels.ssd import ssd_chunked
from megaforge.kernels.wkv7 import wkv7, wkv7_chunked
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.training.numerics import choose_matmul_precision
from tests.bench.ceiling import describe, keep_freed_memory
from tests.bench.harness import interleaved_ratio, print_json, print_table

WIDTH, HEAD = 512, 64


class _Pass(torch.autograd.Function):
    """Forward: v. Backward: every input gets the gradient of y, so that the rest of the layer does all of its work."""

    @staticmethod
    def forward(ctx, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[3].view_as(inputs[3])

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (dy,) * 6


class _PassX(torch.autograd.Function):
    """Forward: x. Backward: its gradient, and zeros for the others, so that the rest of the layer does its work."""

    @staticmethod
    def forward(ctx, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.shapes = [(x.shape, x.dtype) for x in inputs[1:]]
        return inputs[0].view_as(inputs[0])

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return dy, *(torch.zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)


def without_ssd(*inputs: torch.Tensor | None) -> SimpleNamespace:
    """In place of Mamba-2's recurrence."""
    return SimpleNamespace(output=lambda state: (_PassX.apply(*inputs[:6]), None))


def without(*inputs: torch.Tensor | None, **options: object) -> tuple[torch.Tensor, None]:
    """In place of WKV-7."""
    return _Pass.apply(*inputs[:6]), None


class Layer:
    """``letter``: of the layer pattern."""

    def __init__(self, letter: str, length: int, batch: int) -> None:
        cfg = ModelConfig(
            hybrid_layer_pattern=2 * f"{letter}-",
            hidden_size=WIDTH,
            ffn_hidden_size=4 * WIDTH,
            rwkv_head_size=HEAD,
            mamba_head_dim=HEAD,
            rom_num_experts=4,
            vocab_size=64,
        )
        ctx = ParallelContext.single()
        model = HybridModel(make_layer_context(cfg, ctx))
        initialize_parameters(model, ctx, seed=0)
        self.block = model.layers["1"]  # the first makes v_first, all others mix it in
        self.info = PackedSequence(batch, length, torch.device("cpu"))
        self.x = torch.randn(length, batch, WIDTH, requires_grad=True)
        v_first = torch.randn(length, batch, WIDTH, requires_grad=True)
        self.carried = {"v_first": v_first} if letter == "R" else {}
        # Where the layer finds its recurrence.
        self.place = (self.block.mixer, "wkv7" if letter == "R" else "ssd")
        self.dy = torch.randn(length, batch, WIDTH)
        self.tokens = length * batch

    def rate(self, recurrence: Callable[..., object]) -> Callable[[], float]:
        """Tokens a CPU-second of a forward and a backward pass with ``recurrence``, the best of three."""

        def once() -> float:
            self.block.zero_grad(set_to_none=True)
            start = time.process_time()
            self.block(self.x, self.info, self.carried)[0].backward(self.dy)
            return self.tokens / (time.process_time() - start)

        def measure() -> float:
            with mock.patch.object(*self.place, recurrence):
                return max(once() for _ in range(3))

        return measure


# By letter: the layer's name, what stands in for its recurrence, and implementations with their goals.
LAYERS = {
    "R": ("RWKV-7", without, {"native": (wkv7, 0.88), "chunked": (wkv7_chunked, "-")}),
    "M": ("Mamba-2", without_ssd, {"torch": (ssd_chunked, "-")}),
    "O": ("Routing Mamba", without_ssd, {"torch": (ssd_chunked, "-")}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=tuple(LAYERS), help="letters")
    parser.add_argument("--rounds", type=int, default=5, help="measured pairs a case")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--matmul", default="highest", choices=("highest", "auto"), help="as --matmul-precision")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    precision = choose_matmul_precision("auto") if arguments.matmul == "auto" else arguments.matmul
    torch.set_float32_matmul_precision(precision)
    rows: list[list[object]] = []
    cases = {}
    for letter, length in product(arguments.layers, arguments.lengths):
        layer, (title, passes, recurrences) = Layer(letter, length, arguments.batch), LAYERS[letter]
        for name, (recurrence, goal) in recurrences.items():
            ratio = interleaved_ratio(layer.rate(recurrence), layer.rate(passes), arguments.rounds)
            rows.append([title, length, name, ratio.candidate, ratio.peer, ratio.median, ratio.min, ratio.max, goal])
            key = f"{name}_{length}" if letter == "R" else f"{letter}_{length}"
            cases[key] = ratio.case("the same layer without its recurrence")
    print(describe())
    print_table(
        f"layers of width {WIDTH}, batch {arguments.batch}, fp32 matmuls at '{precision}', tokens/s",
        ["layer", "length", "recurrence", "with", "without", "ratio", "min", "max", "goal"],
        rows,
    )
    print_json("layer", cases)


if __name__ == "__main__":
    main()
