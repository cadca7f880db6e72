"""Layers on one rank, filled so that no gradient is trivially zero, and their comparison with a written-out oracle."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import LayerContext, make_layer_context
from megaforge.parallel.param_spec import name_parameters, named_specs

M = TypeVar("M", bound=nn.Module)
CTX = ParallelContext.single()


@torch.no_grad()
def perturb(module: nn.Module, ctx: ParallelContext, scale: float = 0.2) -> None:
    """Adds seeded noise to every parameter, the same global noise at every layout."""
    for spec, parameter in named_specs(module):
        generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
        noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64) * scale
        parameter += spec.take_local(noise, ctx).to(parameter.dtype)


def layer_context(cfg: ModelConfig, dtype: torch.dtype = torch.float64, **facts: Any) -> LayerContext:
    """The context of a layer on one rank; ``facts``: of the layer's place."""
    return dataclasses.replace(make_layer_context(cfg, CTX, dtype=dtype), **facts)


def filled(module: M, name: str = "") -> M:
    """``module`` as ``name``, with its initial weights and noise on top."""
    name_parameters(module, name)
    initialize_parameters(module, CTX, seed=7)
    perturb(module, CTX)
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_agrees(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    oracle: Callable[[Tensor, dict[str, Tensor]], Tensor],
    x: Tensor,
    tolerance: float = 1e-12,
) -> None:
    """Output, input gradient and every trained parameter's gradient of ``run(x)`` equal those of the oracle."""
    weights = {spec.name: p.detach().clone().requires_grad_() for spec, p in named_specs(module)}
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = run(ours), oracle(theirs, weights)
    assert_close(out, expected, tolerance, "output")
    direction = random(*out.shape, seed=99)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close(ours.grad, theirs.grad, tolerance, "input gradient")
    for spec, parameter in named_specs(module):
        if not parameter.requires_grad:
            assert parameter.grad is None, spec.name
            continue
        assert_close(parameter.grad, weights[spec.name].grad, tolerance, spec.name)


def assert_close(ours: Tensor | None, theirs: Tensor | None, tolerance: float, name: str) -> None:
    """The difference over the tensor's norm is within ``tolerance``; the tensor is not zero."""
    assert ours is not None and theirs is not None, name
    norm = float(theirs.detach().double().norm())
    assert norm > 0, f"{name} is zero"
    error = float((ours.detach().double() - theirs.detach().double()).norm()) / norm
    assert error <= tolerance, f"{name}: relative difference {error:.2e}"
