"""The pointwise operators of a GPU for ``bench_gpu_kernels.py``: Triton, plain torch, and their definitions through
torch.compile, forward + backward.

On a CPU, and with TRITON_INTERPRET=1, the same calls run on small tensors, which tests that they can be made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.kernels import rwkv7_fused
from megaforge.kernels.cross_entropy.plain import PlainScores, Scores
from megaforge.kernels.cross_entropy.triton import TritonScores
from megaforge.kernels.native import triton_kernels
from megaforge.kernels.pointwise import functions, reference
from megaforge.kernels.pointwise import triton as fused
from megaforge.kernels.rwkv7_fused import triton as rwkv7
from megaforge.kernels.rwkv7_fused.inputs import RWKV7Inputs

N = 64  # channels of a head
OPS = ("rwkv7_fused", "pointwise", "cross_entropy")
Calls = dict[str, Callable[[], object]]


class Case(NamedTuple):
    """An operator: by Triton, in plain torch as layers use it, its definition; and what it is given."""

    triton: Callable[..., Any]
    torch: Callable[..., Any]
    definition: Callable[..., Any]
    inputs: list[Tensor]


def why_no_triton() -> str:
    """Why a kernel is missing; empty: none is."""
    return next((why for kernels, why in map(triton_kernels, OPS) if kernels is None), "")


def _mixes(x: Tensor, *coefficients: Tensor) -> tuple[Tensor, ...]:
    return rwkv7_fused.shifted_mixes_reference(x, None, None, coefficients)


def _plain_mixes(x: Tensor, *coefficients: Tensor) -> tuple[Tensor, ...]:
    return rwkv7_fused.mix_tokens(x, rwkv7_fused.previous_tokens(x, None, None), coefficients)


def _triton_mixes(x: Tensor, *coefficients: Tensor) -> tuple[Tensor, ...]:
    return rwkv7.ShiftedMixes.apply(x, None, None, *coefficients)


def cases(b: int, s: int, heads: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> dict[str, Case]:
    """By what they do. Activations are of four times the width, rotations of half of each head."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(s, b, *shape, device=device, dtype=dtype).requires_grad_()

    def vector(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).requires_grad_()

    return {**_of_rwkv7(heads, tensor, vector), **_of_any_block(s * b, heads, tensor, vector)}


Make = Callable[..., Tensor]


def _of_rwkv7(heads: int, tensor: Make, vector: Make) -> dict[str, Case]:
    width = heads * N
    finish = [*(tensor(heads, N) for _ in range(4)), tensor(width), vector(width), vector(width), vector(heads, N)]
    inputs = [x for _ in range(3) for x in (tensor(width), vector(width))]
    return {
        "shift and 6 mixes": Case(
            _triton_mixes, _plain_mixes, _mixes, [tensor(width), *(vector(width) for _ in range(6))]
        ),
        "shift and 1 mix": Case(_triton_mixes, _plain_mixes, _mixes, [tensor(width), vector(width)]),
        "inputs of WKV-7": Case(
            lambda *x: rwkv7.FusedInputs.apply(*x, N),
            lambda *x: RWKV7Inputs.apply(*x, N),
            lambda *x: rwkv7_fused.rwkv7_inputs_reference(*x, N),
            [*inputs, vector(width)],
        ),
        "mixed values": Case(
            rwkv7.MixValues.apply, rwkv7_fused.mix_values_reference, rwkv7_fused.mix_values_reference,
            [*(tensor(width) for _ in range(3)), vector(width)],
        ),
        "norm, bonus, gate": Case(
            lambda *x: rwkv7.NormBonusGate.apply(*x, 64e-5),
            lambda *x: rwkv7_fused.norm_bonus_gate_reference(*x, 64e-5),
            lambda *x: rwkv7_fused.norm_bonus_gate_reference(*x, 64e-5),
            finish,
        ),
    }  # fmt: skip


def _of_any_block(tokens: int, heads: int, tensor: Make, vector: Make) -> dict[str, Case]:
    width = heads * N
    angles = tensor(1, N // 4).detach()
    cos, sin = angles.cos(), angles.sin()
    rows = tensor(8 * width).detach().flatten(0, 1).requires_grad_()
    return {
        "RMS norm": Case(
            lambda x, w: fused.Norm.apply(x, w, None, 1e-6, False),
            lambda x, w: functions.RMSNorm.apply(x, w, 1e-6),
            lambda x, w: reference.rms_norm_reference(x, w, 1e-6),
            [tensor(width), vector(width)],
        ),
        "layer norm": Case(
            lambda x, w, b: fused.Norm.apply(x, w, b, 1e-5, True),
            lambda x, w, b: F.layer_norm(x.to(w.dtype), w.shape, w, b, 1e-5).to(x.dtype),
            lambda x, w, b: reference.layer_norm_reference(x, w, b, 1e-5),
            [tensor(width), vector(width), vector(width)],
        ),
        "squared ReLU": Case(
            fused.SquaredReLU.apply, functions.SquaredReLU.apply, reference.squared_relu_reference,
            [tensor(4 * width)],
        ),
        "SwiGLU": Case(
            lambda x: fused.Gated.apply(x, False), functions.SwiGLU.apply, reference.swiglu_reference,
            [tensor(8 * width)],
        ),
        "weighted SwiGLU": Case(
            lambda x, w: fused.Weighted.apply(x, w, False, True),
            lambda x, w: functions.SwiGLU.apply(x) * w.to(x.dtype).unsqueeze(1),
            lambda x, w: reference.swiglu_reference(x) * w.to(x.dtype).unsqueeze(1),
            [rows, vector(tokens)],
        ),
        "rotation": Case(
            lambda x: fused.Rotate.apply(x, cos, sin),
            lambda x: functions.Rotate.apply(x, cos, sin),
            lambda x: reference.apply_rotary_reference(x, cos, sin),
            [tensor(heads, N)],
        ),
    }  # fmt: skip


def both_ways(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """A call: forward, and the gradients of everything."""
    with torch.no_grad():
        out = function(*inputs)
    grads = [torch.randn_like(x) for x in (out if isinstance(out, tuple) else (out,))]

    def once() -> object:
        out = function(*inputs)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), inputs, grads)

    return once


def calls(case: Case, triton: bool = True, compiled: bool = True) -> Calls:
    """The first is the one that others are compared with."""
    found = {"triton": both_ways(case.triton, case.inputs)} if triton else {}
    found["torch"] = both_ways(case.torch, case.inputs)
    if compiled:
        found["compile"] = both_ways(torch.compile(case.definition), case.inputs)
    return found


def _scored(form: Callable[..., Scores], logits: Tensor, target: Tensor, weights: Tensor) -> object:
    """As the head does it. The logits of the next call are this one's gradients, which costs the same."""
    scores = form(logits, target, logits.shape[1])
    picked, peak = scores.picked, scores.peak
    total = scores.sums(peak)
    return peak + total.log() - picked, scores.gradients_of_sum(total, weights)


def cross_entropies(rows: int, width: int, device: str = "cuda", triton: bool = True) -> Calls:
    """Losses of so many bf16 rows of logits, and the logits' gradients."""
    logits = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    target = torch.randint(0, width, (rows,), device=device)
    weights = torch.full((rows,), 1 / rows, device=device)
    forms = {"triton": TritonScores} if triton else {}
    return {
        name: partial(_scored, form, logits, target, weights) for name, form in {**forms, "torch": PlainScores}.items()
    }


def _calls_of(shape: tuple[int, int, int], what: str, device: str, triton: bool, compiled: bool) -> Calls:
    return calls(cases(*shape, device)[what], triton, compiled)


def all_calls(
    shapes: Sequence[tuple[int, int, int]], logits: tuple[int, int], device: str, triton: bool, compiled: bool
) -> dict[tuple[str, str], Callable[[], Calls]]:
    """(label, what) -> what makes the tensors and the calls of a row of the table; ``compiled``: at the first shape,
    for compiling takes a while."""
    found: dict[tuple[str, str], Callable[[], Calls]] = {}
    for shape in shapes:
        for what in cases(1, 1, 1, "cpu"):
            label = " x ".join(map(str, shape))
            compiles = compiled and shape == shapes[0]
            found[label, what] = partial(_calls_of, shape, what, device, triton, compiles)
    found[" x ".join(map(str, logits)), "cross-entropy"] = lambda: cross_entropies(*logits, device, triton)
    return found
