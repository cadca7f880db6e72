"""Compiles the Triton kernels for sm_80 and sm_90 without a GPU; ``test_triton.py`` runs it."""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from megaforge.kernels.cross_entropy import triton_kernels as cross_entropy
from megaforge.kernels.pointwise import triton_kernels as pointwise
from megaforge.kernels.rwkv7_fused import triton_kernels as rwkv7

# Pointers to vectors over channels and to sums: fp32 beside tensors of any type.
FP32_POINTERS = {
    *("dc_ptr", "dfirst_ptr", "partial_ptr", "weight_ptr", "bias_ptr", "rk_ptr", "log_w_ptr", "dlog_w_ptr"),
    *("w0_ptr", "a0_ptr", "v0_ptr", "kk_ptr", "ka_ptr"),
    *("peak_ptr", "sum_ptr", "picked_ptr", "base_ptr", "share_ptr", "dweight_ptr"),
}
FLOATS = {"epsilon", "decay_scale"}
MIX = {"count": 6, "has_first": True, "has_starts": True, "chunks": 2, "wide": tl.float32}
TILE = {"block_rows": rwkv7.ROWS, "block_width": rwkv7.WIDTH}
HEADS = {"n": 64, "wide": tl.float32, "block_rows": rwkv7.ROWS}
STEPS = {"steps": rwkv7.STEPS}
NORM = {"adds": True, "centered": True, "wide": tl.float32, "block_rows": 1, "block_width": 4096}
ELEMENTS = {"wide": tl.float32, "block": pointwise.ELEMENTS}
GATED = {"squared": False, "wide": tl.float32, "block_rows": pointwise.ROWS, "block_width": pointwise.WIDTH}
ROTATE = {"half": 32, "width": 128, "back": True, "wide": tl.float32}
ROW = {"wide": tl.float32, "block_width": cross_entropy.WIDTH}
CONSTANTS: dict[Any, dict[str, Any]] = {
    rwkv7.mix_forward: {**MIX, **TILE},
    rwkv7.mix_backward: {**MIX, **TILE, **STEPS},
    rwkv7.inputs_forward: HEADS,
    rwkv7.inputs_backward: {**HEADS, **STEPS},
    rwkv7.values_forward: {"wide": tl.float32, **TILE},
    rwkv7.values_backward: {"wide": tl.float32, **TILE, **STEPS},
    rwkv7.finish_forward: HEADS,
    rwkv7.finish_backward: {**HEADS, **STEPS},
    cross_entropy.scores: {**ROW, "tiles": 3},
    cross_entropy.gradients: ROW,
    pointwise.norm_forward: NORM,
    pointwise.norm_backward: {**NORM, "steps": pointwise.STEPS},
    pointwise.squared_relu_forward: ELEMENTS,
    pointwise.squared_relu_backward: ELEMENTS,
    pointwise.gated_forward: GATED,
    pointwise.gated_backward: GATED,
    pointwise.weighted_forward: {**GATED, "gated": True},
    pointwise.weighted_backward: {**GATED, "gated": True, "tiles": 16},
    pointwise.rotate: {**ROTATE, "block_rows": 16, "block_half": 32, "block_rest": 64},
}
ALONE = {kernel: {**CONSTANTS[kernel], "adds": False} for kernel in (pointwise.norm_forward, pointwise.norm_backward)}


def type_of(kernel: Any, name: str, scalar: str) -> str:
    if name == "starts_ptr":
        return "*u8"
    if name == "target_ptr":
        return "*i64"
    if name in FLOATS:
        return "fp32"
    if not name.endswith("_ptr") and name[:1] + name[1:].strip("0123456789") not in ("y", "g"):
        return "i32"
    if name == "dfirst_ptr" and kernel is not rwkv7.mix_backward:
        return f"*{scalar}"
    return "*fp32" if name in FP32_POINTERS else f"*{scalar}"


def main() -> None:
    for capability in (80, 90):
        for kernel, constants in [*CONSTANTS.items(), *ALONE.items()]:
            names = list(inspect.signature(kernel.fn).parameters)
            for scalar in ("bf16", "fp32"):
                signature = {n: "constexpr" if n in constants else type_of(kernel, n, scalar) for n in names}
                source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                assert compiled.asm["cubin"]
                print(capability, kernel.fn.__name__, scalar, compiled.metadata.shared, "bytes of shared memory")


if __name__ == "__main__":
    main()
