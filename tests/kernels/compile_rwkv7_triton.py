"""Compiles the Triton kernels of RWKV-7 for sm_80 and sm_90 without a GPU; ``test_rwkv7_fused.py`` runs it."""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from megaforge.kernels.rwkv7_fused import triton_kernels as kernels

FP32_POINTERS = {"dc_ptr", "dfirst_ptr", "partial_ptr", "weight_ptr", "bias_ptr", "rk_ptr"}
MIX = {"count": 6, "has_first": True, "has_starts": True, "wide": tl.float32}
TILE = {"block_rows": kernels.ROWS, "block_width": kernels.WIDTH}
FINISH = {"n": 64, "wide": tl.float32, "block_rows": kernels.ROWS}
CONSTANTS: dict[Any, dict[str, Any]] = {
    kernels.mix_forward: {**MIX, **TILE},
    kernels.mix_backward: {**MIX, **TILE, "steps": kernels.STEPS},
    kernels.finish_forward: FINISH,
    kernels.finish_backward: {**FINISH, "steps": kernels.STEPS},
}


def type_of(name: str, scalar: str) -> str:
    if name == "starts_ptr":
        return "*u8"
    if name in ("rows", "batch", "width", "tokens", "heads"):
        return "i32"
    if name == "epsilon":
        return "fp32"
    return "*fp32" if name in FP32_POINTERS else f"*{scalar}"


def main() -> None:
    for capability in (80, 90):
        for kernel, constants in CONSTANTS.items():
            names = list(inspect.signature(kernel.fn).parameters)
            for scalar in ("bf16", "fp32"):
                signature = {n: "constexpr" if n in constants else type_of(n, scalar) for n in names}
                source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                assert compiled.asm["cubin"]
                print(capability, kernel.fn.__name__, scalar, compiled.metadata.shared, "bytes of shared memory")


if __name__ == "__main__":
    main()
