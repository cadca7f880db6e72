"""``--compile``: torch.compile of what blocks do between their kernels and products."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch

from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.models.stages import ModelChunks

# Code that torch.compile does not look into: what communicates, what has compiled code of its own, and what directs
# autograd. Pointwise operators are in none of them: while they are traced, they are their definitions in plain torch.
OPAQUE = (
    "megaforge.device",
    "megaforge.nn.compressed",
    "megaforge.nn.offload",
    "megaforge.nn.recompute",
    "megaforge.nn.spans",
    "megaforge.parallel",
    *(f"megaforge.kernels.{room}" for room in ("attention", "bitgemm", "cross_entropy", "decode", "gemv")),
    *(f"megaforge.kernels.{room}" for room in ("grouped_mm", "moe_routing", "native", "rwkv7_fused", "wkv7")),
    "megaforge.kernels.ssd.mamba_ssm",
    *(f"megaforge.kernels.pointwise.{module}" for module in ("functions", "native", "triton")),
)
_VARIANTS = 64  # of a function (kinds of blocks, shapes) that are compiled, instead of torch's 8


def compile_blocks(model: HybridModel | ModelChunks, backend: str = "inductor") -> None:
    """Compiles each sublayer of the model's blocks, norm included, the first time that it runs on inputs of a kind.

    Blocks that are alike share their code. A part that the backward pass computes again (``--recompute``) is compiled
    too, so that it makes the same tensors again.

    Raises:
        UserError: there is no compiler for the device.
    """
    device = model.chunks[0].ctx.device.type
    if backend == "inductor":
        _check_compiler(device)
    from torch._dynamo import config, trace_rules
    from torch._functorch import config as autograd

    for module in OPAQUE:
        trace_rules.add(module)
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    autograd.donated_buffer = False  # a backward pass in two halves asks a node twice
    for chunk in model.chunks:
        for block in chunk.blocks:
            block.update = torch.compile(block.update, backend=backend)  # type: ignore[method-assign]
            block.compiled = True


def _check_compiler(device: str) -> None:
    if device == "cuda":
        if find_spec("triton") is None:
            raise UserError("--compile: torch.compile needs Triton on a GPU (pip install triton); or leave it out")
        return
    named = os.environ.get("CXX")
    if not any(shutil.which(compiler) for compiler in ([named] if named else ["g++", "clang++"])):
        raise UserError(
            "--compile: torch.compile needs a C++ compiler (g++, or what CXX names); install one, or leave it out"
        )
