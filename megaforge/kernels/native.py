"""Compiled operators: finding them, and saying once where one is missing.

``csrc/OP/cpu`` and ``csrc/OP/cuda`` are built into ``megaforge.kernels._OP_cpu`` and ``_OP_cuda``. Importing such a
module registers its device's implementation of operators that the op's Python room defines with :mod:`torch.library`.

``MEGAFORGE_NATIVE=0`` in the environment leaves them all out. ``MEGAFORGE_CPU_ISA=avx512|avx2|scalar`` chooses the
instruction set of the CPU code, which otherwise takes the best that the machine has.
"""

from __future__ import annotations

import functools
import importlib
import os

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


@functools.cache
def say_fallback(op: str, device_type: str, instead: str) -> None:
    """Says, once a process and on rank 0 alone, that ``instead`` does the work of the compiled ``op``."""
    reason = why_missing(op, device_type)
    if reason is None:
        print_rank_0(f"{op}: the compiled code for {device_type} does not take tensors of this kind; using {instead}")
        return
    print_rank_0(
        f"{op}: no compiled code for {device_type} ({reason}); using {instead}. "
        "To build it: pip install --no-build-isolation -e ."
    )
