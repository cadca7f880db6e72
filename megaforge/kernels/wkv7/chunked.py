"""WKV-7 in chunks, in plain torch: the portable path, and summaries of spans of tokens.

Within a chunk the recurrence is a few small matrix products, and only one [N, N] state a chunk is passed on.

A span of tokens maps the state before it to the state after it as ``S' = S P + Q``. :func:`wkv7_summary` gives P and Q,
:func:`wkv7_state_gradient` the gradient that the span's own outputs send to the state before it: with these, spans on
different ranks are joined by [N, N] matrices alone (:mod:`megaforge.parallel.context_parallel.wkv7`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megaforge.kernels.wkv7.reference import state_dtype

CHUNK = 32
# Chunks (of one head) that the portable path works on at once on a CPU: enough to amortise the calls, few enough
# that what they pass to each other stays in cache and peak memory does not grow with batch and heads.
CPU_CHUNKS_AT_ONCE = 64


@torch.no_grad()
def wkv7_summary(
    r: torch.Tensor,
    log_w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    document_start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How the tokens change whatever state they start from: ``S' = S P + Q``; no gradient.

    Args:
        r, log_w, k, v, a, b, document_start: as :func:`megaforge.kernels.wkv7.wkv7`.

    Returns:
        P [b, H, N (key), N (key)], zero where a document starts among the tokens, and Q [b, H, N (value), N (key)],
        the state that they leave behind a zero one; fp32 (fp64 for fp64 inputs).
    """
    layout = _Layout(v)
    shape = (layout.rows, layout.n, layout.n)
    through, state = (torch.empty(shape, dtype=layout.dtype, device=v.device) for _ in range(2))
    for group in layout.groups:
        chunk = layout.prepare((r, log_w, k, v, a, b), document_start, group)
        increment = chunk.uv.transpose(-1, -2) @ chunk.carry_out
        product, total = chunk.transition[0], increment[0]
        for n in range(1, layout.chunks):
            product = product @ chunk.transition[n]
            total = torch.baddbmm(increment[n], total, chunk.transition[n])
        through[group], state[group] = product, total
    return through.unflatten(0, v.shape[1:3]), state.unflatten(0, v.shape[1:3])


@torch.no_grad()
def wkv7_state_gradient(
    r: torch.Tensor,
    log_w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dy: torch.Tensor,
    document_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the initial state that comes from ``dy`` alone, at a small part of the cost of the backward pass.

    Args:
        r, log_w, k, v, a, b, document_start: as :func:`megaforge.kernels.wkv7.wkv7`.
        dy: gradient of y, [s, b, H, N].

    Returns:
        [b, H, N (value), N (key)] in fp32 (fp64 for fp64 inputs).
    """
    layout = _Layout(v)
    result = torch.empty(layout.rows, layout.n, layout.n, dtype=layout.dtype, device=v.device)
    for group in layout.groups:
        chunk = layout.prepare((r, log_w, k, v, a, b), document_start, group)
        increment = layout.cut(dy, group).transpose(-1, -2) @ chunk.read
        total = increment[-1]
        for n in reversed(range(layout.chunks - 1)):
            total = torch.baddbmm(increment[n], total, chunk.transition[n].transpose(-1, -2))
        result[group] = total
    return result.unflatten(0, v.shape[1:3])


class _Masks(NamedTuple):
    """Which tokens of a chunk see each other; the batch dimensions are [chunks, heads] or none."""

    inclusive: torch.Tensor  # [c, c] ones up to the token itself
    pairs: torch.Tensor  # [.., 2c, 2c] rows a|r, columns b|k
    carry_in: torch.Tensor | None  # [.., 2c, 1] rows that see the chunk's first state
    carry_out: torch.Tensor | None  # [.., 2c, 1] columns that the chunk's last state sees
    keep: torch.Tensor | None  # [.., 1, 1] chunks through which the state survives


def _masks(starts: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> _Masks:
    """Causal, and within one document. ``starts``: int64 [chunks, heads, c], one where a document starts."""
    ones = torch.ones(CHUNK, CHUNK, dtype=dtype, device=device)
    strict, inclusive = ones.tril(-1), ones.tril()
    pairs = torch.cat([torch.cat([strict, strict], 1), torch.cat([inclusive, inclusive], 1)])
    if starts is None:
        return _Masks(inclusive, pairs, None, None, None)
    # Documents are numbered within the chunk, 0 being the one that the chunk's first state belongs to.
    number = starts.cumsum(-1).repeat(1, 1, 2)
    last = number[..., -1:]
    return _Masks(
        inclusive,
        pairs * (number[..., :, None] == number[..., None, :]),
        (number == 0).to(dtype)[..., None],
        (number == last).to(dtype)[..., None],
        (last == 0).to(dtype)[..., None],
    )


class _Chunks(NamedTuple):
    """What forward and backward need of some chunks apart from their states; [.., 2c, N] unless said otherwise."""

    left_decay: torch.Tensor  # exp of the decay from the centre to before the token (a) | through it (r)
    right_decay: torch.Tensor  # [.., c, N] from the token to the centre
    in_decay: torch.Tensor  # [.., 1, N] from the chunk's start to its centre
    out_decay: torch.Tensor  # [.., 1, N] from its centre to its end
    keep: torch.Tensor  # [.., 1, N] from its start to its end, zero where a document starts between
    left: torch.Tensor  # a|r times their decay
    right: torch.Tensor  # b|k times theirs
    pairs: torch.Tensor  # [.., 2c, 2c] masked products of left and right
    inverse: torch.Tensor  # [.., c, c] (I - A_ab)^-1
    carry_in: torch.Tensor  # a|r as they read the first state
    carry_out: torch.Tensor  # b|k as they write the last state
    removed: torch.Tensor  # [.., c, N] S a = u = u0 + removed S^T
    read: torch.Tensor  # [.., c, N] y = y0 + read S^T
    transition: torch.Tensor  # [.., N, N] S' = S transition + Q
    uv: torch.Tensor  # u0|v


def _inverse(strict: torch.Tensor) -> torch.Tensor:
    """(I - A)^-1 of strictly lower triangular A [.., c, c], by substitution: exact to rounding whatever A is.

    The product (I + A)(I + A^2)(I + A^4)... is the same number and cheaper on paper, but powers of A reach the binomial
    coefficients of c where keys are alike, as in a run of one token, and then cancel: nothing is left of fp32.
    """
    identity = torch.eye(CHUNK, dtype=strict.dtype, device=strict.device).expand_as(strict)
    return torch.linalg.solve_triangular(-strict, identity, upper=False, unitriangular=True)


def _prepare(inputs: tuple[torch.Tensor, ...], masks: _Masks) -> _Chunks:
    """All that needs no state. Inputs r, log_w, k, v, a, b [chunks, heads, c, N] in the internal precision.

    Decays are centred: no exponent is larger than half a chunk's, so nothing overflows and every product of two
    keeps its relative precision. Nothing is ever divided by a decay.
    """
    r, log_w, k, v, a, b = inputs
    c = CHUNK
    through = masks.inclusive @ log_w  # a running sum; cumsum over this dimension is many times slower
    centre = through[..., c // 2 - 1 : c // 2, :]
    left_decay = through.new_empty((*through.shape[:-2], 2 * c, through.shape[-1]))
    torch.sub(through, log_w, out=left_decay[..., :c, :])
    left_decay[..., c:, :] = through
    left_decay.sub_(centre).exp_()
    right_decay = (centre - through).exp_()
    in_decay, out_decay = centre.exp(), (through[..., -1:, :] - centre).exp_()
    left, right = torch.empty_like(left_decay), torch.empty_like(left_decay)
    torch.mul(a, left_decay[..., :c, :], out=left[..., :c, :])
    torch.mul(r, left_decay[..., c:, :], out=left[..., c:, :])
    torch.mul(b, right_decay, out=right[..., :c, :])
    torch.mul(k, right_decay, out=right[..., c:, :])
    pairs = (left @ right.transpose(-1, -2)).mul_(masks.pairs)
    inverse = _inverse(pairs[..., :c, :c])
    carry_in, carry_out, keep = left * in_decay, right * out_decay, in_decay * out_decay
    if masks.carry_in is not None and masks.carry_out is not None and masks.keep is not None:
        carry_in, carry_out, keep = carry_in * masks.carry_in, carry_out * masks.carry_out, keep * masks.keep
    removed = inverse @ carry_in[..., :c, :]
    read = carry_in[..., c:, :] + pairs[..., c:, :c] @ removed
    transition = removed.transpose(-1, -2) @ carry_out[..., :c, :]
    transition.diagonal(dim1=-2, dim2=-1).add_(keep.squeeze(-2))
    uv = torch.cat([inverse @ (pairs[..., :c, c:] @ v), v], -2)
    return _Chunks(
        left_decay, right_decay, in_decay, out_decay, keep, left, right,
        pairs, inverse, carry_in, carry_out, removed, read, transition, uv,
    )  # fmt: skip


def _forward_chunks(chunk: _Chunks, states: torch.Tensor) -> torch.Tensor:
    """y [chunks, heads, c, N]; ``states`` [chunks + 1, heads, N, N] holds the first and gets all others."""
    increment = chunk.uv.transpose(-1, -2) @ chunk.carry_out
    for n in range(increment.shape[0]):
        torch.baddbmm(increment[n], states[n], chunk.transition[n], out=states[n + 1])
    y = chunk.pairs[..., CHUNK:, :] @ chunk.uv
    return y.add_(chunk.read @ states[:-1].transpose(-1, -2))


def _backward_chunks(
    inputs: tuple[torch.Tensor, ...], masks: _Masks, states: torch.Tensor, dy: torch.Tensor, dstate: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Gradients of (r, log_w, k, v, a, b) and of the first state, from those of y and of the last state."""
    r, log_w, k, v, a, b = inputs
    c, chunk = CHUNK, _prepare(inputs, masks)
    increment = dy.transpose(-1, -2) @ chunk.read
    after = torch.empty_like(states)  # gradient of the state after each chunk
    for n in reversed(range(increment.shape[0])):
        after[n] = dstate
        dstate = torch.baddbmm(increment[n], dstate, chunk.transition[n].transpose(-1, -2))
    u0, v = chunk.uv[..., :c, :], chunk.uv[..., c:, :]
    uv = torch.cat([u0 + chunk.removed @ states.transpose(-1, -2), v], -2)
    written = chunk.carry_out @ after.transpose(-1, -2)
    du = written[..., :c, :] + chunk.pairs[..., c:, :c].transpose(-1, -2) @ dy
    dzy = torch.cat([chunk.inverse.transpose(-1, -2) @ du, dy], -2)
    dv = written[..., c:, :] + chunk.pairs[..., c:].transpose(-1, -2) @ dzy
    dpairs = (dzy @ uv.transpose(-1, -2)).mul_(masks.pairs)
    dcarry_in, dcarry_out = dzy @ states, uv @ after
    dend = (chunk.carry_out * dcarry_out).sum(-2, keepdim=True)
    dend += chunk.keep * (after * states).sum(-2, keepdim=True)
    if masks.carry_in is not None and masks.carry_out is not None:
        dcarry_in, dcarry_out = dcarry_in * masks.carry_in, dcarry_out * masks.carry_out
    dleft = dcarry_in.mul_(chunk.in_decay).add_(dpairs @ chunk.right).mul_(chunk.left_decay)
    dright = dcarry_out.mul_(chunk.out_decay).add_(dpairs.transpose(-1, -2) @ chunk.left)
    da, dr = dleft[..., :c, :], dleft[..., c:, :]
    db, dk = dright[..., :c, :] * chunk.right_decay, dright[..., c:, :] * chunk.right_decay
    # A token's decay acts on every later token of the chunk, on itself only where y is read, and on the last state.
    dbefore = a * da
    dlog_w = masks.inclusive.T @ (dbefore + r * dr - k * dk - b * db)
    dlog_w.sub_(dbefore).add_(dend)
    return (dr, dlog_w, dk, dv, da, db), dstate


class _Layout:
    """How [s, b, H, N] is cut into groups of [chunks, heads, c, N]; the last chunk is filled up with zeros, which
    leave the state alone."""

    def __init__(self, like: torch.Tensor) -> None:
        self.s, batch, self.heads, self.n = like.shape
        self.rows = batch * self.heads
        self.chunks = -(-self.s // CHUNK)
        self.dtype, self.device = state_dtype(like.dtype), like.device
        rows = max(1, CPU_CHUNKS_AT_ONCE // self.chunks) if like.device.type == "cpu" else self.rows
        self.groups = [slice(start, min(start + rows, self.rows)) for start in range(0, self.rows, rows)]

    def cut(self, x: torch.Tensor, group: slice) -> torch.Tensor:
        x = x.reshape(self.s, self.rows, self.n)[:, group].to(self.dtype)
        if self.chunks * CHUNK != self.s:
            x = F.pad(x, (0, 0, 0, 0, 0, self.chunks * CHUNK - self.s))
        return x.unflatten(0, (self.chunks, CHUNK)).transpose(1, 2)

    def empty(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.chunks, CHUNK, self.rows, self.n, dtype=dtype, device=self.device)

    def join(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1)[: self.s].view(like.shape)

    def masks(self, document_start: torch.Tensor | None, group: slice) -> _Masks:
        starts = None
        if document_start is not None:
            padded = F.pad(document_start.long(), (0, 0, 0, self.chunks * CHUNK - self.s))
            rows = torch.arange(group.start, group.stop, device=self.device) // self.heads
            starts = padded[:, rows].unflatten(0, (self.chunks, CHUNK)).transpose(1, 2)
        return _masks(starts, self.dtype, self.device)

    def prepare(self, inputs: tuple[torch.Tensor, ...], document_start: torch.Tensor | None, group: slice) -> _Chunks:
        return _prepare(tuple(self.cut(x, group) for x in inputs), self.masks(document_start, group))


class _ChunkedWKV7(torch.autograd.Function):
    """Forward: the chunked WKV-7. Backward: its gradients, from the inputs and the saved first state of every chunk
    (2 N / c times the size of an input); everything else is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        r: torch.Tensor,
        log_w: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        initial_state: torch.Tensor | None,
        document_start: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout = _Layout(v)
        y = layout.empty(v.dtype)
        states = torch.zeros(layout.chunks + 1, layout.rows, layout.n, layout.n, dtype=layout.dtype, device=v.device)
        if initial_state is not None:
            states[0] = initial_state.flatten(0, 1)
        for group in layout.groups:
            chunk = layout.prepare((r, log_w, k, v, a, b), document_start, group)
            y[:, :, group] = _forward_chunks(chunk, states[:, group]).transpose(1, 2)
        ctx.save_for_backward(r, log_w, k, v, a, b, states[:-1], document_start)
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return layout.join(y, v), states[-1].unflatten(0, v.shape[1:3]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, dstate: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, states, document_start = ctx.saved_tensors
        layout = _Layout(inputs[3])
        grads = [layout.empty(x.dtype) for x in inputs]
        dinitial = torch.empty_like(states[0])
        for group in layout.groups:
            pieces, masks = tuple(layout.cut(x, group) for x in inputs), layout.masks(document_start, group)
            dlast = dstate.flatten(0, 1)[group]
            out, dinitial[group] = _backward_chunks(pieces, masks, states[:, group], layout.cut(dy, group), dlast)
            for grad, value in zip(grads, out, strict=True):
                grad[:, :, group] = value.transpose(1, 2)
        joined = (layout.join(grad, x) for grad, x in zip(grads, inputs, strict=True))
        if ctx.state_dtype is None:
            return *joined, None, None
        return *joined, dinitial.unflatten(0, dy.shape[1:3]).to(ctx.state_dtype), None


def wkv7_chunked(
    r: torch.Tensor,
    log_w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    document_start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as :func:`megaforge.kernels.wkv7.wkv7`."""
    return _ChunkedWKV7.apply(r, log_w, k, v, a, b, initial_state, document_start)
