"""Triton kernels of a cross-entropy; :mod:`.triton` calls them. Imported only where Triton is.

Logits are contiguous [rows, width], of which the first ``columns`` take part; arithmetic is in fp32, whatever they are
stored in.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations itself, and knows constexpr alone.

from __future__ import annotations

import triton
import triton.language as tl

WIDTH = 4096  # columns of a tile


@triton.jit
def scores(
    logits_ptr, target_ptr, peak_ptr, sum_ptr, picked_ptr, width, columns,
    tiles: tl.constexpr, wide: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Of a row a program: its largest logit, the sum of exp(logit - largest), and the target's logit or 0."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.full([1], float("-inf"), wide)
    total = tl.zeros([1], wide)
    for tile in range(tiles):
        column = tile * block_width + tl.arange(0, block_width)
        x = tl.load(logits_ptr + row * width + column, mask=column < columns, other=float("-inf")).to(wide)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), axis=0)
        peak = higher
    target = tl.load(target_ptr + row)
    here = (target >= 0) & (target < columns)
    picked = tl.load(logits_ptr + row * width + target, mask=here, other=0.0).to(wide)
    one = tl.arange(0, 1)
    tl.store(peak_ptr + row + one, peak)
    tl.store(sum_ptr + row + one, total)
    tl.store(picked_ptr + row, picked)


@triton.jit
def gradients(
    logits_ptr, target_ptr, base_ptr, share_ptr, weight_ptr, width, columns,
    wide: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """In the logits' place exp(logit - base) * share, less weight in the target's column; a tile of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block_width + tl.arange(0, block_width)
    at = logits_ptr + row * width + column
    x = tl.load(at, mask=column < columns, other=float("-inf")).to(wide)
    found = tl.exp(x - tl.load(base_ptr + row)) * tl.load(share_ptr + row)
    found = tl.where(column == tl.load(target_ptr + row), found - tl.load(weight_ptr + row), found)
    tl.store(at, tl.where(column < columns, found, 0.0), mask=column < width)
