"""Triton kernels of RWKV-7's arithmetic around its projections; :mod:`.triton` calls them.

Imported only where Triton is. Tensors are contiguous; arithmetic is in fp32, whatever they are stored in. Sums over
tokens are left as one partial sum a program, so that they do not depend on the order of programs.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations itself, and knows constexpr alone.

from __future__ import annotations

import triton
import triton.language as tl

ROWS, STEPS = 8, 16  # a program of a backward pass sums over STEPS tiles of ROWS tokens
WIDTH = 128  # channels of a tile


@triton.jit
def _of(i: tl.constexpr, x0, x1, x2, x3, x4, x5):
    if i == 0:
        return x0
    elif i == 1:
        return x1
    elif i == 2:
        return x2
    elif i == 3:
        return x3
    elif i == 4:
        return x4
    else:
        return x5


@triton.jit
def _previous(
    x_ptr, first_ptr, starts_ptr, row, channel, inside, batch, width,
    has_first: tl.constexpr, has_starts: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """The token before each row [rows, 1], zero where a document starts."""
    later = inside & (row >= batch)
    previous = tl.load(x_ptr + (row - batch) * width + channel, mask=later, other=0.0).to(wide)
    if has_first:
        beginning = inside & (row < batch)
        previous += tl.load(first_ptr + row * width + channel, mask=beginning, other=0.0).to(wide)
    if has_starts:
        start = tl.load(starts_ptr + row, mask=inside, other=0)
        previous = tl.where(start != 0, 0.0, previous)
    return previous


@triton.jit
def mix_forward(
    x_ptr, first_ptr, starts_ptr, c_ptr,
    y0, y1, y2, y3, y4, y5,
    rows, batch, width,
    count: tl.constexpr, has_first: tl.constexpr, has_starts: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """y_i = x + (previous - x) * c_i. x, y: [rows = s * b, width]; first: [b, width]; c: [count, width]."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    inside = (row < rows) & (channel < width)
    at = row * width + channel
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
    previous = _previous(x_ptr, first_ptr, starts_ptr, row, channel, inside, batch, width, has_first, has_starts, wide)
    for i in tl.static_range(count):
        c = tl.load(c_ptr + i * width + channel, mask=channel < width, other=0.0).to(wide)
        tl.store(_of(i, y0, y1, y2, y3, y4, y5) + at, x + (previous - x) * c, mask=inside)


@triton.jit
def mix_backward(
    x_ptr, first_ptr, starts_ptr, c_ptr,
    g0, g1, g2, g3, g4, g5,
    dx_ptr, dfirst_ptr, dc_ptr,
    rows, batch, width,
    count: tl.constexpr, has_first: tl.constexpr, has_starts: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, steps: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """From the gradients g_i of the mixes: dx, dfirst [b, width] and partial sums of dc [programs, count, width]."""
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    index = tl.arange(0, 8)[:, None]
    totals = tl.zeros([8, block_width], dtype=wide)  # a row a mix: a loop cannot carry a list of accumulators
    for step in range(steps):
        first_row = (tl.program_id(0) * steps + step) * block_rows
        row = (first_row + tl.arange(0, block_rows))[:, None].to(tl.int64)
        inside = (row < rows) & (channel < width)
        at = row * width + channel
        followed = inside & (row + batch < rows)
        if has_starts:
            followed = followed & (tl.load(starts_ptr + row + batch, mask=row + batch < rows, other=1) == 0)
        difference = _previous(
            x_ptr, first_ptr, starts_ptr, row, channel, inside, batch, width, has_first, has_starts, wide
        ) - tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
        dx = tl.zeros([block_rows, block_width], dtype=wide)
        dprevious = tl.zeros([block_rows, block_width], dtype=wide)
        for i in tl.static_range(count):
            g_ptr = _of(i, g0, g1, g2, g3, g4, g5)
            c = tl.load(c_ptr + i * width + channel, mask=channel < width, other=0.0).to(wide)
            g = tl.load(g_ptr + at, mask=inside, other=0.0).to(wide)
            totals += tl.where(index == i, tl.sum(g * difference, axis=0)[None, :], 0.0)
            onto_previous = g * c
            dprevious += onto_previous
            dx += g - onto_previous
            dx += tl.load(g_ptr + at + batch * width, mask=followed, other=0.0).to(wide) * c
        tl.store(dx_ptr + at, dx, mask=inside)
        if has_first:
            if has_starts:
                dprevious = tl.where(tl.load(starts_ptr + row, mask=row < rows, other=1) != 0, 0.0, dprevious)
            tl.store(dfirst_ptr + at, dprevious, mask=inside & (row < batch))
    to = (tl.program_id(0) * count + index) * width + channel
    tl.store(dc_ptr + to, totals, mask=(index < count) & (channel < width))


@triton.jit
def _normed(y, n: tl.constexpr, epsilon):
    """y [tokens, n] with zero mean and unit variance, and the factor 1 / deviation [tokens, 1]."""
    y = y - (tl.sum(y, axis=1) / n)[:, None]
    scale = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / n + epsilon)
    return y * scale[:, None], scale[:, None]


@triton.jit
def finish_forward(
    y_ptr, r_ptr, k_ptr, v_ptr, gate_ptr, weight_ptr, bias_ptr, rk_ptr,
    out_ptr, tokens, heads, epsilon,
    n: tl.constexpr, wide: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """out = (norm(y) * weight + bias + (sum r k r_k) v) * gate, one head of some tokens a program."""
    head = tl.program_id(1)
    column = tl.arange(0, n)[None, :]
    channel = head * n + column
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    inside = (row < tokens) & (column < n)
    at = row * (heads * n) + channel
    weight, bias = tl.load(weight_ptr + channel).to(wide), tl.load(bias_ptr + channel).to(wide)
    rk = tl.load(rk_ptr + channel).to(wide)
    normed, _ = _normed(tl.load(y_ptr + at, mask=inside, other=0.0).to(wide), n, epsilon)
    r = tl.load(r_ptr + at, mask=inside, other=0.0).to(wide)
    k = tl.load(k_ptr + at, mask=inside, other=0.0).to(wide)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(wide)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(wide)
    bonus = tl.sum(r * k * rk, axis=1)[:, None]
    tl.store(out_ptr + at, (normed * weight + bias + bonus * v) * gate, mask=inside)


@triton.jit
def finish_backward(
    y_ptr, r_ptr, k_ptr, v_ptr, gate_ptr, weight_ptr, bias_ptr, rk_ptr,
    dout_ptr, dy_ptr, dr_ptr, dk_ptr, dv_ptr, dgate_ptr, partial_ptr,
    tokens, heads, epsilon,
    n: tl.constexpr, wide: tl.constexpr, block_rows: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Gradients of everything; those of weight, bias and r_k as partial sums [programs, 3, heads * n]."""
    head = tl.program_id(1)
    column = tl.arange(0, n)[None, :]
    channel = head * n + column
    weight, bias = tl.load(weight_ptr + channel).to(wide), tl.load(bias_ptr + channel).to(wide)
    rk = tl.load(rk_ptr + channel).to(wide)
    dweight = tl.zeros([1, n], dtype=wide)
    dbias = tl.zeros([1, n], dtype=wide)
    drk = tl.zeros([1, n], dtype=wide)
    for step in range(steps):
        first_row = (tl.program_id(0) * steps + step) * block_rows
        row = (first_row + tl.arange(0, block_rows))[:, None].to(tl.int64)
        inside = (row < tokens) & (column < n)
        at = row * (heads * n) + channel
        normed, scale = _normed(tl.load(y_ptr + at, mask=inside, other=0.0).to(wide), n, epsilon)
        r = tl.load(r_ptr + at, mask=inside, other=0.0).to(wide)
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(wide)
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(wide)
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(wide)
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(wide)
        bonus = tl.sum(r * k * rk, axis=1)[:, None]
        tl.store(dgate_ptr + at, dout * (normed * weight + bias + bonus * v), mask=inside)
        dz = dout * gate
        tl.store(dv_ptr + at, dz * bonus, mask=inside)
        dbonus = tl.sum(dz * v, axis=1)[:, None]
        tl.store(dr_ptr + at, dbonus * k * rk, mask=inside)
        tl.store(dk_ptr + at, dbonus * r * rk, mask=inside)
        drk += tl.sum(dbonus * r * k, axis=0)[None, :]
        dweight += tl.sum(dz * normed, axis=0)[None, :]
        dbias += tl.sum(dz, axis=0)[None, :]
        dnormed = dz * weight
        mean = (tl.sum(dnormed, axis=1) / n)[:, None]
        along = (tl.sum(dnormed * normed, axis=1) / n)[:, None]
        tl.store(dy_ptr + at, (dnormed - mean - normed * along) * scale, mask=inside)
    partial = partial_ptr + tl.program_id(0) * 3 * heads * n + channel
    tl.store(partial, dweight)
    tl.store(partial + heads * n, dbias)
    tl.store(partial + 2 * heads * n, drk)
