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
def _place(row, rows, chunks: tl.constexpr):
    """The row's place in its chunk."""
    if chunks > 1:
        return row % (rows // chunks)
    else:
        return row


@triton.jit
def _first(row, place, rows, batch, chunks: tl.constexpr):
    """The row of first [chunks, batch, width] that belongs to a row at the beginning of a chunk."""
    if chunks > 1:
        return row // (rows // chunks) * batch + place
    else:
        return place


@triton.jit
def _previous(
    x_ptr, first_ptr, starts_ptr, row, channel, inside, rows, batch, width,
    has_first: tl.constexpr, has_starts: tl.constexpr, chunks: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """The token before each row [rows, 1], zero where a document starts."""
    place = _place(row, rows, chunks)
    previous = tl.load(x_ptr + (row - batch) * width + channel, mask=inside & (place >= batch), other=0.0).to(wide)
    if has_first:
        at = _first(row, place, rows, batch, chunks) * width + channel
        previous += tl.load(first_ptr + at, mask=inside & (place < batch), other=0.0).to(wide)
    if has_starts:
        start = tl.load(starts_ptr + row, mask=inside, other=0)
        previous = tl.where(start != 0, 0.0, previous)
    return previous


@triton.jit
def mix_forward(
    x_ptr, first_ptr, starts_ptr, c_ptr,
    y0, y1, y2, y3, y4, y5,
    rows, batch, width,
    count: tl.constexpr, has_first: tl.constexpr, has_starts: tl.constexpr, chunks: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """y_i = x + (previous - x) * c_i. x, y: [rows = s * b, width]; first: [chunks, b, width]; c: [count, width]."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    inside = (row < rows) & (channel < width)
    at = row * width + channel
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
    previous = _previous(
        x_ptr, first_ptr, starts_ptr, row, channel, inside, rows, batch, width, has_first, has_starts, chunks, wide
    )
    for i in tl.static_range(count):
        c = tl.load(c_ptr + i * width + channel, mask=channel < width, other=0.0).to(wide)
        tl.store(_of(i, y0, y1, y2, y3, y4, y5) + at, x + (previous - x) * c, mask=inside)


@triton.jit
def mix_backward(
    x_ptr, first_ptr, starts_ptr, c_ptr,
    g0, g1, g2, g3, g4, g5,
    dx_ptr, dfirst_ptr, dc_ptr,
    rows, batch, width,
    count: tl.constexpr, has_first: tl.constexpr, has_starts: tl.constexpr, chunks: tl.constexpr, wide: tl.constexpr,
    block_rows: tl.constexpr, steps: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """From the gradients g_i of the mixes: dx, dfirst [chunks, b, width], and dc in part [programs, count, width]."""
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    index = tl.arange(0, 8)[:, None]
    totals = tl.zeros([8, block_width], dtype=wide)  # a row a mix: a loop cannot carry a list of accumulators
    for step in range(steps):
        first_row = (tl.program_id(0) * steps + step) * block_rows
        row = (first_row + tl.arange(0, block_rows))[:, None].to(tl.int64)
        inside = (row < rows) & (channel < width)
        at = row * width + channel
        place = _place(row, rows, chunks)
        followed = inside & (place + batch < rows // chunks)
        if has_starts:
            followed = followed & (tl.load(starts_ptr + row + batch, mask=row + batch < rows, other=1) == 0)
        difference = _previous(
            x_ptr, first_ptr, starts_ptr, row, channel, inside, rows, batch, width, has_first, has_starts, chunks, wide
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
            to = _first(row, place, rows, batch, chunks) * width + channel
            tl.store(dfirst_ptr + to, dprevious, mask=inside & (place < batch))
    to = (tl.program_id(0) * count + index) * width + channel
    tl.store(dc_ptr + to, totals, mask=(index < count) & (channel < width))


@triton.jit
def _unit(u, epsilon):
    """u [tokens, n] at norm one, and the norms [tokens, 1], at least epsilon."""
    norm = tl.sqrt(tl.sum(u * u, axis=1))[:, None]
    norm = tl.where(norm < epsilon, epsilon, norm)  # not tl.maximum, which would lose a NaN
    return u / norm, norm


@triton.jit
def inputs_forward(
    decay_ptr, w0_ptr, rate_ptr, a0_ptr, key_ptr, kk_ptr, ka_ptr,
    log_w_ptr, k_ptr, a_ptr, b_ptr, tokens, heads, decay_scale, epsilon,
    n: tl.constexpr, wide: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """What WKV-7 takes besides r and v, one head of some tokens a program."""
    channel = tl.program_id(1) * n + tl.arange(0, n)[None, :]
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    inside = (row < tokens) & (channel < heads * n)
    at = row * (heads * n) + channel
    decay = tl.load(decay_ptr + at, mask=inside, other=0.0).to(wide) + tl.load(w0_ptr + channel).to(wide)
    tl.store(log_w_ptr + at, tl.sigmoid(decay) * decay_scale, mask=inside)
    lr = tl.sigmoid(tl.load(rate_ptr + at, mask=inside, other=0.0).to(wide) + tl.load(a0_ptr + channel).to(wide))
    key = tl.load(key_ptr + at, mask=inside, other=0.0).to(wide)
    tl.store(k_ptr + at, key * (1.0 + (lr - 1.0) * tl.load(ka_ptr + channel).to(wide)), mask=inside)
    unit, _ = _unit(key * tl.load(kk_ptr + channel).to(wide), epsilon)
    tl.store(a_ptr + at, -unit, mask=inside)
    tl.store(b_ptr + at, unit * lr, mask=inside)


@triton.jit
def inputs_backward(
    decay_ptr, w0_ptr, rate_ptr, a0_ptr, key_ptr, kk_ptr, ka_ptr,
    dlog_w_ptr, dk_ptr, da_ptr, db_ptr, ddecay_ptr, drate_ptr, dkey_ptr, partial_ptr,
    tokens, heads, decay_scale, epsilon,
    n: tl.constexpr, wide: tl.constexpr, block_rows: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Gradients of decay, rate and key; those of w0, a0, k_k and k_a as partial sums [programs, 4, heads * n]."""
    channel = tl.program_id(1) * n + tl.arange(0, n)[None, :]
    w0, a0 = tl.load(w0_ptr + channel).to(wide), tl.load(a0_ptr + channel).to(wide)
    kk, ka = tl.load(kk_ptr + channel).to(wide), tl.load(ka_ptr + channel).to(wide)
    dw0 = tl.zeros([1, n], dtype=wide)
    da0 = tl.zeros([1, n], dtype=wide)
    dkk = tl.zeros([1, n], dtype=wide)
    dka = tl.zeros([1, n], dtype=wide)
    for step in range(steps):
        first_row = (tl.program_id(0) * steps + step) * block_rows
        row = (first_row + tl.arange(0, block_rows))[:, None].to(tl.int64)
        inside = (row < tokens) & (channel < heads * n)
        at = row * (heads * n) + channel
        d = tl.sigmoid(tl.load(decay_ptr + at, mask=inside, other=0.0).to(wide) + w0)
        dlog_w = tl.load(dlog_w_ptr + at, mask=inside, other=0.0).to(wide)
        ddecay = (1.0 - d) * d * dlog_w * decay_scale
        tl.store(ddecay_ptr + at, ddecay, mask=inside)
        dw0 += tl.sum(ddecay, axis=0)[None, :]
        lr = tl.sigmoid(tl.load(rate_ptr + at, mask=inside, other=0.0).to(wide) + a0)
        key = tl.load(key_ptr + at, mask=inside, other=0.0).to(wide)
        dk = tl.load(dk_ptr + at, mask=inside, other=0.0).to(wide)
        da = tl.load(da_ptr + at, mask=inside, other=0.0).to(wide)
        db = tl.load(db_ptr + at, mask=inside, other=0.0).to(wide)
        unit, norm = _unit(key * kk, epsilon)
        dunit = db * lr - da
        along = tl.where(norm > epsilon, tl.sum(dunit * unit, axis=1)[:, None], 0.0)
        du = (dunit - along * unit) / norm
        drate = (1.0 - lr) * lr * (db * unit + key * dk * ka)
        tl.store(drate_ptr + at, drate, mask=inside)
        tl.store(dkey_ptr + at, (1.0 + (lr - 1.0) * ka) * dk + du * kk, mask=inside)
        da0 += tl.sum(drate, axis=0)[None, :]
        dkk += tl.sum(du * key, axis=0)[None, :]
        dka += tl.sum((lr - 1.0) * key * dk, axis=0)[None, :]
    partial = partial_ptr + tl.program_id(0) * 4 * heads * n + channel
    tl.store(partial, dw0)
    tl.store(partial + heads * n, da0)
    tl.store(partial + 2 * heads * n, dkk)
    tl.store(partial + 3 * heads * n, dka)


@triton.jit
def values_forward(
    v_ptr, first_ptr, rate_ptr, v0_ptr, out_ptr, rows, width,
    wide: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """out = v + (first - v) * sigmoid(v0 + rate); all [rows, width] but v0 [width]."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows))[:, None].to(tl.int64)
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    inside = (row < rows) & (channel < width)
    at = row * width + channel
    v0 = tl.load(v0_ptr + channel, mask=channel < width, other=0.0).to(wide)
    share = tl.sigmoid(tl.load(rate_ptr + at, mask=inside, other=0.0).to(wide) + v0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(wide)
    first = tl.load(first_ptr + at, mask=inside, other=0.0).to(wide)
    tl.store(out_ptr + at, v + (first - v) * share, mask=inside)


@triton.jit
def values_backward(
    v_ptr, first_ptr, rate_ptr, v0_ptr, dout_ptr, dv_ptr, dfirst_ptr, drate_ptr, partial_ptr, rows, width,
    wide: tl.constexpr, block_rows: tl.constexpr, steps: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Gradients of v, first and rate; that of v0 as partial sums [programs, width]."""
    channel = (tl.program_id(1) * block_width + tl.arange(0, block_width))[None, :]
    v0 = tl.load(v0_ptr + channel, mask=channel < width, other=0.0).to(wide)
    total = tl.zeros([1, block_width], dtype=wide)
    for step in range(steps):
        first_row = (tl.program_id(0) * steps + step) * block_rows
        row = (first_row + tl.arange(0, block_rows))[:, None].to(tl.int64)
        inside = (row < rows) & (channel < width)
        at = row * width + channel
        share = tl.sigmoid(tl.load(rate_ptr + at, mask=inside, other=0.0).to(wide) + v0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(wide)
        first = tl.load(first_ptr + at, mask=inside, other=0.0).to(wide)
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(wide)
        drate = dout * (first - v) * share * (1.0 - share)
        tl.store(dv_ptr + at, dout * (1.0 - share), mask=inside)
        tl.store(dfirst_ptr + at, dout * share, mask=inside)
        tl.store(drate_ptr + at, drate, mask=inside)
        total += tl.sum(drate, axis=0)[None, :]
    tl.store(partial_ptr + tl.program_id(0) * width + channel, total, mask=channel < width)


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
