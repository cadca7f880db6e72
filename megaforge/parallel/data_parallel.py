"""Gradient reduction: flat buckets, summed over replicas while the backward pass still runs.

Losses are divided by counts over the global batch before the backward pass, so every reduction is a plain sum and
no factor depends on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.param_spec import named_specs


@dataclass
class _Bucket:
    """Neighbouring parameters whose gradients share one flat buffer and one all-reduce over the ranks with copies."""

    flat: Tensor
    parameters: list[nn.Parameter]
    replicas: Axis
    waiting: set[int] = field(default_factory=set)
    work: dist.Work | None = None


class GradientReducer:
    """Gives each parameter a ``main_grad`` (fp32; fp64 for fp64 ones), summed over replicas and, where declared, tp.

    The replicas of a dense parameter are the ranks of dp and cp, those of an expert the ranks of edp.

    For parameters in the buffer's own dtype, ``.grad`` is a view of the buffer and autograd accumulates straight into
    it; 16-bit gradients are added to it as they arrive. Buckets are filled in reverse module order, which is about
    the order in which the backward pass produces gradients (Li et al., arXiv 2006.15704).
    """

    def __init__(
        self,
        module: nn.Module,
        ctx: ParallelContext,
        *,
        bucket_size: int = 25_000_000,
        overlap: bool = True,
        shared: Sequence[nn.Parameter] = (),
    ) -> None:
        """``shared``: parameters that two pipeline stages on this rank use, so that the last micro-batch gives them
        two gradients."""
        self.ctx = ctx
        self.overlap = overlap
        self._last_microbatch = True
        self._sent = 0
        self._shared = {id(parameter) for parameter in shared}
        self._expects_another: set[int] = set()
        declared = [(spec, parameter) for spec, parameter in named_specs(module) if parameter.requires_grad]
        self._tp_partial = [p for spec, p in declared if spec.tp_partial_grad] if ctx.tp.size > 1 else []
        self.buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        for name in ("dp_cp", "edp"):
            own = [p for spec, p in reversed(declared) if spec.replica_axis == name]
            for group in _pack(own, bucket_size):
                self._add_bucket(group, ctx.axis(name))

    def _add_bucket(self, parameters: list[nn.Parameter], replicas: Axis) -> None:
        wide = _main_dtype(parameters[0])
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=wide, device=parameters[0].device)
        bucket = _Bucket(flat, parameters, replicas)
        offset = 0
        for parameter in parameters:
            parameter.main_grad = flat[offset : offset + parameter.numel()].view(parameter.shape)  # type: ignore[attr-defined]
            offset += parameter.numel()
            self._bucket_of[id(parameter)] = bucket
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self.buckets.append(bucket)

    def zero(self) -> None:
        """Forgets all gradients; call once before a global batch."""
        self._sent = 0
        self._expects_another = set(self._shared)
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.waiting = {id(p) for p in bucket.parameters}
            bucket.work = None
            for parameter in bucket.parameters:
                direct = parameter.dtype == bucket.flat.dtype
                parameter.grad = parameter.main_grad if direct else None  # type: ignore[attr-defined]

    def set_last_microbatch(self, last: bool) -> None:
        """Says whether the coming backward pass is the last of the global batch: only then are buckets sent."""
        self._last_microbatch = last

    def _on_gradient(self, parameter: Tensor) -> None:
        """Takes in a gradient that autograd has just accumulated, and sends its bucket when that was the last one."""
        bucket = self._bucket_of[id(parameter)]
        main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        if parameter.grad is not None and parameter.grad.data_ptr() != main_grad.data_ptr():
            main_grad.add_(parameter.grad)
            parameter.grad = main_grad if parameter.dtype == main_grad.dtype else None
        if not self._last_microbatch:
            return
        if id(parameter) in self._expects_another:
            self._expects_another.discard(id(parameter))
            return
        bucket.waiting.discard(id(parameter))
        if self.overlap:
            self._send_ready()

    def _send_ready(self) -> None:
        """Sends buckets strictly in order: ranks may finish them in different orders (an expert without tokens has no
        gradient), but collectives must start in the same order everywhere."""
        while self._sent < len(self.buckets) and not self.buckets[self._sent].waiting:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self.buckets[self._sent]
        if bucket.replicas.group is not None:
            bucket.work = dist.all_reduce(bucket.flat, group=bucket.replicas.group, async_op=True)
        self._sent += 1

    def finish(self) -> None:
        """Waits until every ``main_grad`` holds the sum over its replicas, and over tp where ranks had only parts."""
        # Buckets are still unsent without overlap, or where a parameter had no gradient in this batch.
        while self._sent < len(self.buckets):
            self._send_next()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
        self._sum_partial_over_tp()

    def _sum_partial_over_tp(self) -> None:
        for dtype in sorted({_main_dtype(p) for p in self._tp_partial}, key=str):
            grads = [p.main_grad for p in self._tp_partial if _main_dtype(p) == dtype]  # type: ignore[attr-defined]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=self.ctx.tp.group)
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))


def _main_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _pack(parameters: list[nn.Parameter], bucket_size: int) -> list[list[nn.Parameter]]:
    """Cuts the list into runs of one main dtype of at most ``bucket_size`` elements (a larger one stands alone)."""
    groups: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in parameters:
        full = filled + parameter.numel() > bucket_size
        if not groups or full or _main_dtype(groups[-1][0]) != _main_dtype(parameter):
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += parameter.numel()
    return groups
