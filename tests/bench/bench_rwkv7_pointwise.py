"""What RWKV-7's arithmetic between its matrix products costs on the CPU: the share of a block that each part takes.

A block of d 512 (time mix, relu^2 FFN with channel mix), 4 x 512 tokens, forward + backward, WKV-7 replaced by a copy.
Each part is run alone on tensors of the block's shapes, turn about with the block; CPU time of the one thread. The
last column is how much faster the whole block would be if the part cost nothing: the most that fusing it can bring.

    MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 python tests/bench/bench_rwkv7_pointwise.py

(Without these settings fresh pages from the kernel are a large part of every operation on large tensors.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.model_config import ModelConfig
from megaforge.kernels.pointwise import rms_norm
from megaforge.kernels.rwkv7_fused import norm_bonus_gate, rwkv7_inputs
from megaforge.models.hybrid import HybridModel
from megaforge.nn.activations import activate
from megaforge.nn.token_shift import shift_and_mix
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from tests.bench.harness import Measure, cpu_seconds, interleaved_ratio, print_json, print_table

BATCH, LENGTH, HIDDEN, HEAD, INNER = 4, 512, 512, 64, 2048


class _Copy(torch.autograd.Function):
    """In the place of WKV-7: y = v, and a gradient for every input."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs[3].clone(), inputs[3].new_zeros(1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (dy,) * 6 + (None, None)


def both_passes(function: Callable[..., Any], inputs: list[torch.Tensor]) -> Measure:
    """A measure: forward and backward, CPU seconds of this thread."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(x) for x in outputs]
    leaves = [x for x in inputs if x.requires_grad]

    def run() -> None:
        out = function(*inputs)
        torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, grads)

    return cpu_seconds(run)


def block(dtype: torch.dtype) -> Measure:
    ctx = ParallelContext.single()
    shape = {"hidden_size": HIDDEN, "rwkv_head_size": HEAD, "ffn_hidden_size": INNER}
    model = HybridModel(
        make_layer_context(ModelConfig(**shape, hybrid_layer_pattern="R-R-", vocab_size=128), ctx, dtype=dtype)
    )
    initialize_parameters(model, ctx, 1)
    layer = model.layers["1"]
    layer.mixer.wkv7 = lambda *x: _Copy.apply(*x)
    info = PackedSequence(BATCH, LENGTH, torch.device("cpu"))
    x, v_first = (torch.randn(LENGTH, BATCH, HIDDEN, dtype=dtype, requires_grad=True) for _ in range(2))
    return both_passes(lambda *x: layer(x[0], info, {"v_first": x[1]})[0], [x, v_first, *layer.parameters()])


def parts(dtype: torch.dtype) -> dict[str, Measure]:
    """Forward + backward of each part, with as many calls as a block has of it."""

    def tensor(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, dtype=kind).requires_grad_()

    def vectors(count: int) -> list[torch.Tensor]:
        return [tensor(HIDDEN, kind=torch.float32) for _ in range(count)]

    info = PackedSequence(BATCH, LENGTH, torch.device("cpu"))
    tokens, heads = (LENGTH, BATCH, HIDDEN), (LENGTH, BATCH, HIDDEN // HEAD, HEAD)
    w0, a0, k_k, k_a, weight, bias, norm = vectors(7)
    finish = [*(tensor(*heads) for _ in range(4)), tensor(*tokens), weight, bias]
    return {
        "token shift and 6 mixes": both_passes(
            lambda x, *c: shift_and_mix(x, info, None, c), [tensor(*tokens), *vectors(6)]
        ),
        "decay, rates, keys": both_passes(
            lambda *x: rwkv7_inputs(*x, HEAD), [tensor(*tokens), w0, tensor(*tokens), a0, tensor(*tokens), k_k, k_a]
        ),
        "norm, bonus, gate": both_passes(
            lambda *x: norm_bonus_gate(*x, 64e-5), [*finish, tensor(HIDDEN // HEAD, HEAD, kind=torch.float32)]
        ),
        "relu^2": both_passes(lambda x: activate("relu2", x), [tensor(LENGTH, BATCH, INNER)]),
        "RMS norm (twice)": both_passes(
            lambda x, w: rms_norm(rms_norm(x, w, 1e-6), w, 1e-6), [tensor(*tokens), norm]
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    cases = {}
    for dtype in (torch.float32, torch.bfloat16):
        whole = block(dtype)
        for name, part in parts(dtype).items():
            ratio = interleaved_ratio(part, whole, args.rounds)
            bound = 1 / (1 - ratio.median)
            spread = f"{ratio.min:.3f}-{ratio.max:.3f}"
            rows.append([str(dtype)[6:], name, 1e3 * ratio.candidate, ratio.median, spread, bound])
            cases[f"{str(dtype)[6:]} {name}"] = ratio.case("the whole block without WKV-7", bound=round(bound, 3))
    print_table("RWKV-7 block", ["dtype", "part", "ms", "share", "range", "block without it"], rows)
    print_json("rwkv7_pointwise", cases)


if __name__ == "__main__":
    main()
