"""Compiled operators: finding them, defining them, and saying once where one is missing.

``csrc/OP/cpu`` and ``csrc/OP/cuda`` are built into ``megaforge.kernels._OP_cpu`` and ``_OP_cuda``. Importing such a
module registers its device's implementation of operators that the op's Python room defines with :mod:`torch.library`.

Triton kernels of an op are the module ``megaforge.kernels.OP.triton_kernels``, imported only where Triton is.

``MEGAFORGE_NATIVE=0`` in the environment leaves them all out. ``MEGAFORGE_CPU_ISA=avx512|avx2|scalar`` chooses the
instruction set of the CPU code, which otherwise takes the best that the machine has.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaforge.config.launcher import print_rank_0

SWITCH = "MEGAFORGE_NATIVE"


@functools.cache
def why_missing(op: str, device_type: str) -> str | None:
    """None where ``op`` has compiled code for ``device_type`` ("cpu" or "cuda"), which is loaded now; otherwise the
    reason why not."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        importlib.import_module(f"megaforge.kernels._{op}_{device_type}")
    except ImportError as error:
        return str(error)
    return None


def load(op: str) -> frozenset[str]:
    """The devices whose compiled ``op`` is there, and "meta", with which plans and dry runs see GPUs. An op calls it as
    it is imported, and not when it is first used, which torch.compile may be tracing."""
    return frozenset({"meta", *(device for device in ("cpu", "cuda") if why_missing(op, device) is None)})


@functools.cache
def say_fallback(op: str, reason: str, instead: str = "plain torch, several times slower") -> None:
    """Says, once a process and on rank 0 alone, that ``instead`` does the work of ``op``, and why."""
    print_rank_0(f"{op}: {reason}; using {instead}")


def say_uncompiled(op: str, device_type: str) -> None:
    """:func:`say_fallback` of an ``op`` whose compiled code is missing or does not take these tensors."""
    reason = why_missing(op, device_type)
    if reason is None:
        say_fallback(op, f"the compiled code for {device_type} does not take tensors of this kind")
    else:
        how = "plain torch, several times slower. To build it: pip install --no-build-isolation -e ."
        say_fallback(op, f"no compiled code for {device_type} ({reason})", how)


@functools.cache
def triton_kernels(op: str) -> tuple[Any, str]:
    """The module of Triton kernels of ``op``; or None and why, where Triton is not installed or compiled code is not
    wanted."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0"
    try:
        return importlib.import_module(f"megaforge.kernels.{op}.triton_kernels"), ""
    except ImportError as error:
        return None, f"{error}; to install it: pip install 'megaforge[gpu]'"


def takes_triton(op: str, what: str, x: Tensor) -> bool:
    """Whether tensors like ``x`` go through the Triton kernels of ``op``: those of GPUs do, but in fp64. Where they do
    not, it says so once; ``what`` is what the message calls the op."""
    if x.device.type != "cuda":
        return False
    if x.dtype == torch.float64:
        say_no_triton(what, "they compute in fp32 at most, not in fp64")
        return False
    kernels, missing = triton_kernels(op)
    if kernels is None:
        say_no_triton(what, missing)
    return kernels is not None


def say_no_triton(what: str, reason: str) -> None:
    """Says, once a process and on rank 0 alone, that a GPU computes in plain torch, and why."""
    say_fallback(what, f"no Triton kernel ({reason})")


_LIBRARY = torch.library.Library("megaforge", "FRAGMENT")


def define(
    schema: str,
    shapes: Callable[..., Any],
    plain: Callable[..., Any] | None = None,
    gradient: Callable[..., Any] | None = None,
    context: Callable[..., None] | None = None,
) -> None:
    """Defines the operator ``torch.ops.megaforge.NAME``, for which ``csrc`` registers each device's code.

    Args:
        schema: ``NAME(arguments) -> results``.
        shapes: gives empty results, for meta and fake tensors.
        plain: what computes on devices without compiled code; None: nothing.
        gradient: of the arguments, given the context and the gradients of the results; None: not differentiable.
        context: keeps what ``gradient`` needs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"megaforge::{name}", shapes, lib=_LIBRARY)
    if plain is not None:
        _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    if gradient is not None:
        torch.library.register_autograd(f"megaforge::{name}", gradient, setup_context=context, lib=_LIBRARY)
