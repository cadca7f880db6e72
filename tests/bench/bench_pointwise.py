"""Norms, activations and the head's cross-entropy, both passes, against plain torch and torch.compile.

    python tests/bench/bench_pointwise.py [--rounds 9] [--tokens 2048] [--width 512] [--inner 1408] [--no-compile]

CPU seconds of one thread, outputs allocated, freed memory kept on all sides; buffers take turns, so that inputs
come from where a training step has them. Plain torch is what runs without compiled code.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.kernels import pointwise
from megaforge.kernels.cross_entropy.native import CompiledScores
from megaforge.kernels.cross_entropy.plain import PlainScores
from megaforge.kernels.pointwise import native, reference
from tests.bench.ceiling import keep_freed_memory
from tests.bench.harness import Measure, Ratio, cpu_seconds, interleaved_ratio, print_json, print_table

VOCABULARY = 8192
SETS = 12  # of buffers that take turns
Function = Callable[..., Tensor]
Result = tuple[str, str, Ratio]  # what, against what, the peer's time over ours


def least_of_two(function: Callable[[], Any], repeat: int) -> Measure:
    """A measure: CPU seconds of this thread for one call, the least of two times ``repeat`` calls."""
    measure = cpu_seconds(function, repeat)
    return lambda: min(measure(), measure())


def passes(
    function: Function, inputs: list[list[Tensor]], grads: list[Tensor]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward and a backward pass of ``function``, each call on the next set of buffers."""
    turns = itertools.cycle(inputs)
    outputs = [function(*given) for given in inputs]
    pairs = itertools.cycle(list(zip(outputs, inputs, grads, strict=True)))

    def forward() -> None:
        function(*next(turns))

    def backward() -> None:
        out, given, grad = next(pairs)
        torch.autograd.grad(out, given, grad, retain_graph=True)

    return forward, backward


def scored(form: Any, logits: list[Tensor], target: Tensor) -> Callable[[], Any]:
    """A cross-entropy's losses and gradients from the next set of logits, which the gradients replace."""
    turns, weights = itertools.cycle(logits), torch.ones(len(target))

    def run() -> None:
        chunk = next(turns)
        scores = form(chunk, target, chunk.shape[1])
        total = scores.sums(scores.peak)
        scores.gradients_of_sum(total, weights)

    return run


def softmax_gradient(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What torch.compile is given: losses and gradients."""
    logs = logits.float().log_softmax(-1)
    chosen = torch.arange(logits.shape[1]) == target[:, None]
    return -logs.gather(1, target[:, None]), (logs.exp() - chosen.float()).to(logits.dtype)


def plainly(function: Function) -> Function:
    """``function`` without compiled code."""

    def run(*given: Tensor) -> Tensor:
        with mock.patch.object(native, "takes", lambda *_: False):
            return function(*given)

    return run


def layers(tokens: int, width: int, inner: int, rounds: int, compiling: bool) -> Iterator[Result]:
    """Norms and activations."""
    operators: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
        "rms_norm": (
            lambda x, w: pointwise.rms_norm(x, w, 1e-5),
            lambda x, w: reference.rms_norm_reference(x, w, 1e-5),
            [(tokens, width), (width,)],
        ),
        "layer_norm": (
            lambda x, w, b: pointwise.layer_norm(x, w, b, 1e-5),
            lambda x, w, b: reference.layer_norm_reference(x, w, b, 1e-5),
            [(tokens, width), (width,), (width,)],
        ),
        "swiglu": (pointwise.swiglu, reference.swiglu_reference, [(tokens, 2 * inner)]),
        "gated_relu2": (pointwise.gated_squared_relu, reference.gated_squared_relu_reference, [(tokens, 2 * inner)]),
        "relu2": (pointwise.squared_relu, reference.squared_relu_reference, [(tokens, 4 * width)]),
    }
    for (name, (function, definition, shapes)), dtype in itertools.product(
        operators.items(), (torch.bfloat16, torch.float32)
    ):
        types = [dtype if len(shape) > 1 else torch.float32 for shape in shapes]
        inputs = [
            [torch.randn(shape).to(t).requires_grad_() for shape, t in zip(shapes, types, strict=True)]
            for _ in range(SETS)
        ]
        grads = [torch.randn_like(function(*given)) for given in inputs]
        ours = passes(function, inputs, grads)
        peers = {"torch": plainly(function)}
        if compiling:
            torch._dynamo.reset()
            peers["torch.compile"] = torch.compile(definition)
        for peer, theirs in peers.items():
            for which, mine, other in zip(("forward", "backward"), ours, passes(theirs, inputs, grads), strict=True):
                ratio = interleaved_ratio(least_of_two(other, SETS), least_of_two(mine, SETS), rounds)
                label = f"{name} {which} {str(dtype)[6:]}"
                yield label, peer, ratio


def losses(rounds: int, compiling: bool) -> Iterator[Result]:
    """The cross-entropy of a chunk of tokens."""
    for dtype in (torch.bfloat16, torch.float32):
        logits = [torch.randn(1024, VOCABULARY).to(dtype) for _ in range(3)]
        target = torch.randint(0, VOCABULARY, (1024,))
        turns = itertools.cycle(logits)
        others = {"torch": scored(PlainScores, logits, target)}
        if compiling:
            compiled = torch.compile(softmax_gradient)
            others["torch.compile"] = functools.partial(lambda f, t, at: f(next(t), at), compiled, turns, target)
        for peer, other in others.items():
            mine = scored(CompiledScores, logits, target)
            ratio = interleaved_ratio(least_of_two(other, 3), least_of_two(mine, 3), rounds)
            label = f"cross_entropy both, 1024 of {VOCABULARY}, {str(dtype)[6:]}"
            yield label, peer, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    if "cpu" not in native.COMPILED:
        sys.exit("pointwise is not compiled here: pip install --no-build-isolation -e .")
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: list[list[object]] = []
    cases: dict[str, dict[str, Any]] = {}
    compiling = not options.no_compile
    results = itertools.chain(
        layers(options.tokens, options.width, options.inner, options.rounds, compiling),
        losses(options.rounds, compiling),
    )
    for label, peer, ratio in results:
        rows.append([label, peer, 1e3 * ratio.peer, f"{ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f})"])
        cases[f"{label}, {peer}"] = ratio.case("ours", note="the peer's time over ours")
    print_table(
        f"{options.tokens} tokens, width {options.width}, inner {options.inner}; one thread, CPU time",
        ["operator", "against", "ours, ms", "times as fast"],
        rows,
    )
    print_json("pointwise", cases)


if __name__ == "__main__":
    main()
