"""Triton kernels of norms, activations and rotations; :mod:`.triton` calls them.

Imported only where Triton is. Tensors are contiguous, but for what is normed or turned; arithmetic is in fp32, whatever
they are stored in. Sums over rows are left as one partial sum a program, so that they do not depend on the order of
programs.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations itself, and knows constexpr alone.

from __future__ import annotations

import triton
import triton.language as tl

STEPS = 32  # a program of a norm's backward pass sums over STEPS tiles of whole rows
TILE = 4096  # elements of a norm's tile, at most, where a row is shorter
ROWS, WIDTH = 4, 256  # of a tile of a gate
ELEMENTS = 1024  # of a tile of squared ReLU and of a rotation


@triton.jit
def _normed(x_ptr, at, inside, width, epsilon, centered: tl.constexpr, wide: tl.constexpr):
    """Rows at root mean square one, and of mean zero if centered; and the factors [rows, 1] that made them so."""
    return _row_normed(tl.load(x_ptr + at, mask=inside, other=0.0).to(wide), inside, width, epsilon, centered)


@triton.jit
def _row_normed(x, inside, width, epsilon, centered: tl.constexpr):
    """The same of rows that are loaded, zero where they are not inside."""
    if centered:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)
    scale = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + epsilon))[:, None]
    return x * scale, scale


@triton.jit
def _in_groups(row, width, group, stride):
    """Where a row begins."""
    return row // group * stride + row % group * width


@triton.jit
def norm_forward(
    x_ptr, update_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, rows, width, epsilon, group, stride,
    adds: tl.constexpr, centered: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """y = normed(x) * weight, and + bias if centered. y: [rows, width], x likewise, but every group of rows begins a
    stride after the one before; a program has some whole rows. If it adds, total = x + update is normed in the place of
    x, where rows are not in groups."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    channel = tl.arange(0, block_width)[None, :]
    inside = (row < rows) & (channel < width)
    at = row * width + channel
    if adds:
        total = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
        total += tl.load(update_ptr + at, mask=inside, other=0.0).to(wide)
        total = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        y, _ = _row_normed(total.to(wide), inside, width, epsilon, centered)
    else:
        source = _in_groups(row, width, group, stride) + channel
        y, _ = _normed(x_ptr, source, inside, width, epsilon, centered, wide)
    y = y * tl.load(weight_ptr + channel, mask=channel < width, other=0.0).to(wide)
    if centered:
        y += tl.load(bias_ptr + channel, mask=channel < width, other=0.0).to(wide)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def norm_backward(
    x_ptr, weight_ptr, dy_ptr, dtotal_ptr, dx_ptr, partial_ptr, rows, width, epsilon, group, stride,
    adds: tl.constexpr, centered: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, steps: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """dx, and the gradients of weight and, if centered, of bias in part [programs, 1 or 2, width]. If it adds, dx gets
    dtotal too: the gradient that x has by other ways."""
    channel = tl.arange(0, block_width)[None, :]
    weight = tl.load(weight_ptr + channel, mask=channel < width, other=0.0).to(wide)
    dweight = tl.zeros([1, block_width], dtype=wide)
    dbias = tl.zeros([1, block_width], dtype=wide)
    for step in range(steps):
        first_row = (tl.program_id(0) * steps + step) * block_rows
        row = (first_row + tl.arange(0, block_rows))[:, None].to(tl.int64)
        inside = (row < rows) & (channel < width)
        at = row * width + channel
        source = _in_groups(row, width, group, stride) + channel
        normed, scale = _normed(x_ptr, source, inside, width, epsilon, centered, wide)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(wide)
        dweight += tl.sum(dy * normed, axis=0)[None, :]
        dbias += tl.sum(dy, axis=0)[None, :]
        dnormed = dy * weight
        dx = dnormed - normed * (tl.sum(dnormed * normed, axis=1) / width)[:, None]
        if centered:
            dx = dx - (tl.sum(dnormed, axis=1) / width)[:, None]
        dx = dx * scale
        if adds:
            dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(wide)
        tl.store(dx_ptr + at, dx, mask=inside)
    sums: tl.constexpr = 2 if centered else 1
    partial = partial_ptr + tl.program_id(0) * sums * width + channel
    tl.store(partial, dweight, mask=channel < width)
    if centered:
        tl.store(partial + width, dbias, mask=channel < width)


@triton.jit
def squared_relu_forward(x_ptr, y_ptr, count, wide: tl.constexpr, block: tl.constexpr):
    """y = max(x, 0)^2."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(wide)
    x = tl.where(x < 0.0, 0.0, x)  # which keeps a NaN
    tl.store(y_ptr + at, x * x, mask=at < count)


@triton.jit
def squared_relu_backward(x_ptr, dy_ptr, dx_ptr, count, wide: tl.constexpr, block: tl.constexpr):
    """dx = 2 max(x, 0) dy."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(wide)
    dy = tl.load(dy_ptr + at, mask=at < count, other=0.0).to(wide)
    tl.store(dx_ptr + at, 2.0 * tl.where(x < 0.0, 0.0, x) * dy, mask=at < count)


@triton.jit
def _activated(gate, squared: tl.constexpr):
    """max(gate, 0)^2 if squared, or silu(gate); and its derivative."""
    if squared:
        positive = tl.where(gate < 0.0, 0.0, gate)
        return positive * positive, 2.0 * positive
    else:
        share = tl.sigmoid(gate)
        return gate * share, share * (1.0 + gate * (1.0 - share))


@triton.jit
def gated_forward(
    x_ptr, y_ptr, rows, width,
    squared: tl.constexpr, wide: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """y = activated(gate) * up. x: [rows, 2 width], gate before up; y: [rows, width]."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    inside = (row < rows) & (channel < width)
    gate = tl.load(x_ptr + 2 * row * width + channel, mask=inside, other=0.0).to(wide)
    up = tl.load(x_ptr + (2 * row + 1) * width + channel, mask=inside, other=0.0).to(wide)
    activated, _ = _activated(gate, squared)
    tl.store(y_ptr + row * width + channel, activated * up, mask=inside)


@triton.jit
def gated_backward(
    x_ptr, dy_ptr, dx_ptr, rows, width,
    squared: tl.constexpr, wide: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Both gradients in one tensor [rows, 2 width]."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    inside = (row < rows) & (channel < width)
    at_gate, at_up = 2 * row * width + channel, (2 * row + 1) * width + channel
    gate = tl.load(x_ptr + at_gate, mask=inside, other=0.0).to(wide)
    up = tl.load(x_ptr + at_up, mask=inside, other=0.0).to(wide)
    dy = tl.load(dy_ptr + row * width + channel, mask=inside, other=0.0).to(wide)
    activated, slope = _activated(gate, squared)
    tl.store(dx_ptr + at_gate, dy * up * slope, mask=inside)
    tl.store(dx_ptr + at_up, dy * activated, mask=inside)


@triton.jit
def weighted_forward(
    x_ptr, weight_ptr, y_ptr, rows, width,
    squared: tl.constexpr, gated: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """y = activated(x) * weight of the row. x: [rows, width], or gated [rows, 2 width], gate before up."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    inside = (row < rows) & (channel < width)
    parts: tl.constexpr = 2 if gated else 1
    at = parts * row * width + channel
    found, _ = _activated(tl.load(x_ptr + at, mask=inside, other=0.0).to(wide), squared)
    if gated:
        found = found * tl.load(x_ptr + at + width, mask=inside, other=0.0).to(wide)
    found = found * tl.load(weight_ptr + row, mask=row < rows, other=0.0).to(wide)
    tl.store(y_ptr + row * width + channel, found, mask=inside)


@triton.jit
def weighted_backward(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, dweight_ptr, rows, width,
    squared: tl.constexpr, gated: tl.constexpr, tiles: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """dx and dweight [rows]; a program has some whole rows, of so many tiles."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    weight = tl.load(weight_ptr + row, mask=row < rows, other=0.0).to(wide)
    dweight = tl.zeros([block_rows, 1], dtype=wide)
    parts: tl.constexpr = 2 if gated else 1
    for tile in range(tiles):
        channel = (tile * block_width + tl.arange(0, block_width))[None, :]
        inside = (row < rows) & (channel < width)
        at = parts * row * width + channel
        dy = tl.load(dy_ptr + row * width + channel, mask=inside, other=0.0).to(wide)
        activated, slope = _activated(tl.load(x_ptr + at, mask=inside, other=0.0).to(wide), squared)
        if gated:
            up = tl.load(x_ptr + at + width, mask=inside, other=0.0).to(wide)
            tl.store(dx_ptr + at + width, dy * weight * activated, mask=inside)
            activated, slope = activated * up, slope * up
        tl.store(dx_ptr + at, dy * weight * slope, mask=inside)
        dweight += tl.sum(dy * activated, axis=1)[:, None]
    tl.store(dweight_ptr + row, dweight, mask=row < rows)


@triton.jit
def rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, rows, batch, heads, stride_s, stride_b,
    half: tl.constexpr, width: tl.constexpr, back: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, block_half: tl.constexpr, block_rest: tl.constexpr,
):  # fmt: skip
    """Pairs of channels (i, i + half) turned by their token's angles, or back; the rest of a head is copied.

    x: [s, b, heads, width] with these strides of s and b; y: [rows = s * b * heads, width]; cos, sin: [s * b, half].
    """
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None]
    token, head = row // heads, row % heads
    source = (token // batch).to(tl.int64) * stride_s + (token % batch).to(tl.int64) * stride_b + head * width
    target = row.to(tl.int64) * width
    pair = tl.arange(0, block_half)[None, :]
    inside = (row < rows) & (pair < half)
    angle = token.to(tl.int64) * half + pair
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(wide)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(wide)
    if back:
        sin = -sin
    first = tl.load(x_ptr + source + pair, mask=inside, other=0.0).to(wide)
    second = tl.load(x_ptr + source + half + pair, mask=inside, other=0.0).to(wide)
    tl.store(y_ptr + target + pair, first * cos - second * sin, mask=inside)
    tl.store(y_ptr + target + half + pair, second * cos + first * sin, mask=inside)
    if width > 2 * half:
        channel = 2 * half + tl.arange(0, block_rest)[None, :]
        inside = (row < rows) & (channel < width)
        tl.store(y_ptr + target + channel, tl.load(x_ptr + source + channel, mask=inside, other=0.0), mask=inside)
