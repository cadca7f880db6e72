"""Inputs of WKV-7 for the tests of every implementation, random ones and hard ones, and how results are compared."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.kernels.wkv7 import wkv7_recurrent

NAMES = ("r", "log_w", "k", "v", "a", "b", "initial_state")
MIN_LOG_DECAY = -math.exp(-0.5)


def make_inputs(
    s: int, *, batch: int = 2, heads: int = 3, n: int = 16, minimum_decay: bool = False, seed: int = 0
) -> list[Tensor]:
    """r, log_w, k, v, a, b [s, b, H, N] and a state [b, H, N, N] as an RWKV-7 layer makes them, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (s, batch, heads, n)
    kk = F.normalize(normal(*shape), dim=-1)
    log_w = torch.full(shape, MIN_LOG_DECAY, dtype=torch.float64)
    if not minimum_decay:
        log_w *= torch.sigmoid(2 * normal(*shape) - 2)
    rate = torch.sigmoid(normal(*shape))
    return [normal(*shape), log_w, normal(*shape), normal(*shape), -kk, kk * rate, normal(batch, heads, n, n)]


@dataclass(frozen=True)
class HardCase:
    """Inputs that text and training bring and that no random draw does.

    Attributes:
        tokens: random; alike: keys that differ by a thousandth; one: every token is the same, in all six inputs; runs:
            a run of one token, three others, a run of another token; empty: every second token's keys are zero.
        rate: in-context learning rate of every channel; None: some are 0 and some are 1.
        decay: share of the lowest log decay, of every channel; None: some have all of it and some none.
        length: tokens.
        scale: of r, k, v and the initial state.
    """

    tokens: str
    rate: float | None
    decay: float | None
    length: int = 72
    scale: float = 1.0

    def inputs(self, n: int, batch: int = 2, heads: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """As :func:`make_inputs`, of numbers that ``dtype`` holds (decay and state: fp32)."""
        generator = torch.Generator().manual_seed(3)
        shape = (self.length, batch, heads, n)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def rows(x: Tensor) -> Tensor:
            if self.tokens == "one":
                return x[:1].expand(shape).clone()
            if self.tokens == "runs":
                half = self.length // 2
                return x[[0] * half + [1, 2, 3] + [4] * (self.length - half - 3)]
            return x

        def channels(value: float | None) -> Tensor:
            return rows((draw() > 0).double()) if value is None else torch.full(shape, value, dtype=torch.float64)

        r, k, v = (self.scale * rows(draw()) for _ in range(3))
        keys = rows(draw())
        if self.tokens == "alike":
            keys = keys[:1] + 1e-3 * keys
        if self.tokens == "empty":
            keys[::2], k[::2] = 0, 0
        kk = F.normalize(keys, dim=-1)
        log_w = MIN_LOG_DECAY * channels(self.decay)
        state = self.scale * torch.randn(batch, heads, n, n, generator=generator, dtype=torch.float64)
        inputs = [r, log_w, k, v, -kk, kk * channels(self.rate), state]
        return rounded(inputs, dtype)

    def document_start(self, batch: int = 2) -> Tensor:
        """bool [s, b]: documents of the last sequence start amid a run, next to and far from a chunk's bounds."""
        start = torch.zeros(self.length, batch, dtype=torch.bool)
        start[[token for token in (20, 32, 33) if token < self.length], -1] = True
        return start


HARD = {
    "one key, minimum decay": HardCase("alike", 0.7, 1.0),
    "one key, rate 0.9": HardCase("alike", 0.9, 0.5),
    "one key, whole rate, no decay": HardCase("alike", 1.0, 0.0),
    "one token, rate 0.9, no decay": HardCase("one", 0.9, 0.0),
    "one token, whole rate, no decay": HardCase("one", 1.0, 0.0),
    "one token, whole rate, minimum decay": HardCase("one", 1.0, 1.0),
    "one token, no rate, no decay": HardCase("one", 0.0, 0.0),
    "runs, rates and decays at either end": HardCase("runs", None, None),
    "runs, whole rate, hardly any decay": HardCase("runs", 1.0, 1e-6),
    "runs, large": HardCase("runs", 0.9, 0.1, scale=1e6),
    "runs, small": HardCase("runs", 0.9, 0.1, scale=1e-6),
    "empty keys": HardCase("empty", 0.9, 0.1),
    "many of one token": HardCase("one", 0.9, 0.02, length=200),
    "a single token": HardCase("random", 1.0, 0.0, length=1),
}
hard = pytest.mark.parametrize("case", HARD.values(), ids=HARD.keys())


def rounded(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The inputs as ``dtype`` holds them, but decay and state in fp32; float64."""
    kept = ("log_w", "initial_state")
    pairs = zip(NAMES, inputs, strict=True)
    return [x.to(torch.float32 if name in kept else dtype).double() for name, x in pairs]


def run(function, inputs, document_start, dtype) -> dict[str, Tensor]:
    """Outputs and gradients of a fixed random functional of both outputs, by name, float64."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, state = function(*inputs, document_start)
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, state)]
    got = torch.autograd.grad([y, state], inputs, [g.to(x.dtype) for g, x in zip(grads, (y, state), strict=True)])
    named = {"y": y, "state": state, **{f"d{name}": grad for name, grad in zip(NAMES, got, strict=True)}}
    return {name: value.detach().double() for name, value in named.items()}


def run_as(function, inputs, document_start, dtype) -> dict[str, Tensor]:
    """As ``run``, with decay and state in fp32 whatever ``dtype``."""

    def mixed(r, log_w, k, v, a, b, state, starts):
        r, k, v, a, b = (x.to(dtype) for x in (r, k, v, a, b))
        y, final = function(r, log_w, k, v, a, b, state, starts)
        return y.float(), final

    return run(mixed, inputs, document_start, torch.float32)


def assert_close(got, expected, tolerance) -> None:
    for name, reference in expected.items():
        # A gradient that the resets make exactly zero has no scale of its own.
        error = (got[name] - reference).norm() / reference.norm().clamp_min(1e-6)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def relative_error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """In the norm, of at least ``floor``; infinite where what should be zero is not."""
    error, size = float((got.double() - expected).norm()), max(float(expected.norm()), floor)
    return error / size if size else (math.inf if error else 0.0)


@functools.lru_cache(maxsize=64)
def _by_definition(case: HardCase, n: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the recurrence makes of a case in fp64, and how far from that it is itself in ``dtype``."""
    inputs = case.inputs(n, dtype=dtype)
    exact = run(wkv7_recurrent, inputs, case.document_start(), torch.float64)
    own = run_as(wkv7_recurrent, inputs, case.document_start(), dtype)
    return exact, {name: relative_error(own[name], value) for name, value in exact.items()}


def assert_as_good_as_the_definition(
    function, case: HardCase, n: int, dtype: torch.dtype, tolerance: float, times: float = 3
) -> None:
    """Outputs and all gradients are within ``tolerance`` of the exact ones or, where the sums themselves cancel, within
    so many ``times`` the error that the recurrence has in the same precision."""
    exact, own = _by_definition(case, n, dtype)
    got = run_as(function, case.inputs(n, dtype=dtype), case.document_start(), dtype)
    for name, value in exact.items():
        error, allowed = relative_error(got[name], value), max(tolerance, times * own[name])
        assert error <= allowed, f"{name}: relative error {error:.2e}, token by token {own[name]:.2e}"
