"""Gradient reduction: flat buckets, summed over replicas while the backward pass still runs.

Losses are divided by counts over the global batch before the backward pass, so every reduction is a plain sum and
no factor depends on the layout.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.parallel.buckets import Bucket, main_dtype, make_bucket_groups
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.grad_compression import AllReduceHook, CommHook, Finish
from megaforge.parallel.param_spec import main_grad_of, spec_of
from megaforge.parallel.zero import ShardedParameters


class _Gradients:
    """The gradients of one bucket.

    Attributes:
        full: [bucket.size] what this rank's backward passes have added up; None while there is nothing (ZeRO-2).
        own: [bucket.slice_size] the sum over replicas that this rank keeps; None without ZeRO.
        waiting: parameters without a gradient since the last send.
        sent: whether the reduction was started and no further gradient may come.
    """

    def __init__(self, bucket: Bucket, *, sharded: bool, transient: bool) -> None:
        self.bucket = bucket
        self.full: Tensor | None = None
        self.own: Tensor | None = None
        self.waiting: set[int] = set()
        self.sent = False
        self._transient = transient
        self._views: dict[int, Tensor] = {}
        if not transient:
            _ = self._allocate()
        if sharded and self.full is not None:
            self.own = bucket.own_slice(self.full)
        elif sharded:
            self.own = torch.zeros(bucket.slice_size, dtype=bucket.main_dtype, device=bucket.device)
        if self.own is not None:
            held = bucket.own_views(self.own)
        else:
            held = [self.view_of(parameter) for parameter in bucket.parameters]
        for parameter, view in zip(bucket.parameters, held, strict=True):
            parameter.__dict__["main_grad"] = view

    def _allocate(self) -> Tensor:
        bucket = self.bucket
        self.full = torch.zeros(bucket.size, dtype=bucket.main_dtype, device=bucket.device)
        self._views = dict(zip(map(id, bucket.parameters), bucket.views(self.full), strict=True))
        return self.full

    def view_of(self, parameter: Tensor) -> Tensor:
        """Where gradients of ``parameter`` add up, in its shape."""
        if self.full is None:
            _ = self._allocate()
        return self._views[id(parameter)]

    def zero(self) -> None:
        """Forgets everything, and lets autograd write straight into the buffer where types agree."""
        for buffer in (self.full, self.own):
            if buffer is not None:
                buffer.zero_()
        for parameter in self.bucket.parameters:
            parameter.grad = None
            if not self._transient and parameter.dtype == self.bucket.main_dtype:
                parameter.grad = self.view_of(parameter)
        self.expect_all()

    def expect_all(self) -> None:
        self.waiting = {id(parameter) for parameter in self.bucket.parameters}
        self.sent = False

    def take_in(self, parameter: Tensor) -> None:
        """Adds the gradient that autograd has left at ``parameter``, unless it already lies in the buffer."""
        grad = parameter.grad
        view = self.view_of(parameter)
        if grad is not None and grad is not view:
            view.add_(grad)
            in_place = not self._transient and parameter.dtype == view.dtype
            parameter.grad = view if in_place else None

    def take_full(self) -> Tensor:
        """The buffer, to be reduced; ZeRO-2 lets go of it."""
        full = self._allocate() if self.full is None else self.full
        if self._transient:
            self.full, self._views = None, {}
        return full


class _BucketGroup:
    """The buckets of one chunk of the model, sent strictly in order: ranks may finish them in different orders (an
    expert without tokens has no gradient), but collectives must start in the same order everywhere."""

    def __init__(self, buckets: list[Bucket], *, sharded: bool, transient: bool) -> None:
        self.gradients = [_Gradients(bucket, sharded=sharded, transient=transient) for bucket in buckets]
        self.last_microbatch = False
        self.sent = 0

    def zero(self) -> None:
        """Forgets the gradients, and that any were sent."""
        self.last_microbatch = False
        self.sent = 0
        for gradients in self.gradients:
            gradients.zero()

    def expect_all(self) -> None:
        """All buckets wait for all of their gradients again."""
        self.sent = 0
        for gradients in self.gradients:
            gradients.expect_all()


def _calls(method: weakref.WeakMethod[Any]) -> Callable[[Tensor], None]:
    """``method`` as long as its object lives, then nothing."""

    def hook(parameter: Tensor) -> None:
        alive = method()
        if alive is not None:
            alive(parameter)

    return hook


class GradientReducer:
    """Sums every gradient over its replicas (dp and cp; for experts edp) and, where declared, over tp, into the
    parameter's ``main_grad`` (fp32; fp64 for fp64 parameters).

    Without ``shards`` every rank gets the whole sum in the parameter's shape. With them (ZeRO) buckets are
    reduce-scattered, and ``main_grad`` is 1-d: that of :func:`megaforge.parallel.flat_shard.optimizer_shard`. With
    ``free_buffers`` (ZeRO-2) each micro-batch is reduced into the shares at once and full buffers live only while
    they fill and travel; the price is a reduction per micro-batch.

    Several modules are the chunks of one model on this rank (virtual pipeline stages): each is told of its own last
    micro-batch, and is sent while the others still compute. What chunks share is sent once at the end; with
    ``free_buffers`` after every backward pass through one of its owners. A chunk's buckets are all under way before
    the next backward pass begins, so that replicas start their collectives in the same order.

    Args:
        bucket_size: elements of a bucket; with ``shards`` their buckets are used.
        overlap: reduce during the backward pass; otherwise afterwards, with the same numbers.
        reduction: how a bucket is summed; by default in the type of ``main_grad``.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        ctx: ParallelContext,
        *,
        bucket_size: int = 25_000_000,
        overlap: bool = True,
        shards: ShardedParameters | None = None,
        free_buffers: bool = False,
        reduction: CommHook | None = None,
    ) -> None:
        if free_buffers and shards is None:
            raise ValueError("gradient buffers can be freed only where gradients are sharded")
        self.ctx = ctx
        self.overlap = overlap
        self.shards = shards
        self._every_microbatch = free_buffers
        self._reduction = AllReduceHook() if reduction is None else reduction
        chunks = [module] if isinstance(module, nn.Module) else list(module)
        bucket_groups = make_bucket_groups(chunks, ctx, bucket_size) if shards is None else shards.bucket_groups
        self._active: int | None = None  # the chunk of the last backward pass
        self._bucket_groups = [
            _BucketGroup(bucket_group, sharded=shards is not None, transient=free_buffers)
            for bucket_group in bucket_groups
        ]
        self._in_flight: list[tuple[_Gradients, Tensor, Finish]] = []
        self._place_of: dict[int, tuple[_BucketGroup, _Gradients]] = {}
        # The collector cannot see a cycle through a parameter's hook: a strong reference here would keep the model and
        # its process groups (and their threads) for good.
        on_gradient = weakref.WeakMethod(self._on_gradient)
        for bucket_group in self._bucket_groups:
            for gradients in bucket_group.gradients:
                for parameter in gradients.bucket.parameters:
                    self._place_of[id(parameter)] = bucket_group, gradients
                    parameter.register_post_accumulate_grad_hook(_calls(on_gradient))
        owned = [{id(parameter) for parameter in chunk.parameters()} for chunk in chunks]
        self._shared_of = [
            [g for g in self._bucket_groups[-1].gradients if any(id(p) in own for p in g.bucket.parameters)]
            for own in owned
        ]
        parameters = [p for bucket in self.buckets for p in bucket.parameters]
        self._tp_partial = [p for p in parameters if spec_of(p).tp_partial_grad] if ctx.tp.size > 1 else []

    @property
    def frees_buffers(self) -> bool:
        """Whether full buckets live only while they fill and travel (ZeRO-2)."""
        return self._every_microbatch

    @property
    def buckets(self) -> list[Bucket]:
        """Chunk by chunk, in the order in which they are sent."""
        return [gradients.bucket for bucket_group in self._bucket_groups for gradients in bucket_group.gradients]

    def zero_grad(self) -> None:
        """Forgets all gradients; call once before a global batch."""
        self._in_flight = []
        self._active = None
        for bucket_group in self._bucket_groups:
            bucket_group.zero()

    def forget_losses(self) -> None:
        """Forgets what a compressed reduction keeps of earlier gradients (``--grad-compression``): after one that was
        not finite it would spoil all that follow."""
        self._reduction.forget()

    def set_last_microbatch(self, last: bool, chunk: int = 0) -> None:
        """Call before each micro-batch's backward pass through ``chunk``; says whether it is the chunk's last of the
        global batch, for only then are buckets sent (under ZeRO-2 after every one)."""
        self._end_backward()
        self._active = chunk
        self._bucket_groups[chunk].last_microbatch = last

    def _end_backward(self) -> None:
        """The backward pass that was announced last is over: sends what is due and was not sent during it."""
        if self._active is None:
            return
        bucket_group, shared = self._bucket_groups[self._active], self._shared_of[self._active]
        self._active = None
        if bucket_group.last_microbatch or self._every_microbatch:
            self._send_rest(bucket_group)
        if self._every_microbatch:
            for gradients in shared:
                self._send(gradients)
                gradients.expect_all()
            bucket_group.expect_all()

    def _on_gradient(self, parameter: Tensor) -> None:
        """Takes in a gradient that autograd has just accumulated, and sends its bucket when that was the last one."""
        bucket_group, gradients = self._place_of[id(parameter)]
        if self.shards is not None:
            self.shards.check_used_whole(parameter)
        unannounced = self._every_microbatch and self._active is None
        if unannounced or (gradients.sent and (gradients.bucket.replicas.size > 1 or self._every_microbatch)):
            raise RuntimeError(
                f"{spec_of(parameter).name} got a gradient after its bucket was sent: "
                "set_last_microbatch must precede each backward pass, and the last must be the last"
            )
        gradients.take_in(parameter)
        if bucket_group.last_microbatch or (self._every_microbatch and bucket_group is not self._bucket_groups[-1]):
            gradients.waiting.discard(id(parameter))
            if self.overlap:
                self._send_ready(bucket_group)

    def _send_ready(self, bucket_group: _BucketGroup) -> None:
        while bucket_group.sent < len(bucket_group.gradients) and not bucket_group.gradients[bucket_group.sent].waiting:
            self._send_next(bucket_group)

    def _send_rest(self, bucket_group: _BucketGroup) -> None:
        """Sends what is left: without overlap, or where a parameter had no gradient."""
        while bucket_group.sent < len(bucket_group.gradients):
            self._send_next(bucket_group)

    def _send_next(self, bucket_group: _BucketGroup) -> None:
        self._send(bucket_group.gradients[bucket_group.sent])
        bucket_group.sent += 1

    def _send(self, gradients: _Gradients) -> None:
        gradients.sent = True
        full = gradients.take_full()
        finish = self._reduction.start(gradients.bucket, full, scatter=gradients.own is not None)
        self._in_flight.append((gradients, full, finish))
        if self._every_microbatch:
            self._land(keep=1)  # so that no more than two full buffers live besides the one that fills

    def _land(self, keep: int = 0) -> None:
        """Waits for all but the ``keep`` newest reductions."""
        while len(self._in_flight) > keep:
            gradients, full, finish = self._in_flight.pop(0)
            finish()
            if self._every_microbatch and gradients.own is not None:
                gradients.own.add_(gradients.bucket.own_slice(full))

    def finish_grad_sync(self) -> None:
        """Waits until every ``main_grad`` holds the sum over its replicas, and over tp where each rank had a part."""
        self._end_backward()
        if not self._every_microbatch:
            for bucket_group in self._bucket_groups:
                self._send_rest(bucket_group)
        self._land()
        self._sum_partial_over_tp()

    def _sum_partial_over_tp(self) -> None:
        """Sums whole gradients or shares: ranks along tp hold the same ranges."""
        for dtype in sorted({main_dtype(p) for p in self._tp_partial}, key=str):
            grads = [main_grad_of(p) for p in self._tp_partial if main_dtype(p) == dtype]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=self.ctx.tp.group)
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))
