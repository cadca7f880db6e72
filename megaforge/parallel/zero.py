"""Parameters whose updates are sharded over their replicas (ZeRO: Rajbhandari et al., arXiv 1910.02054).

Every rank computes with whole parameters, and updates only its slice of each bucket, for which alone it keeps fp32
masters and moments. The updated slices travel while the next forward pass already runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.run_config import ParallelConfig
from megaforge.errors import UserError
from megaforge.kernels.bitgemm.reference import pack_codes, unpack_codes
from megaforge.parallel.buckets import Bucket, Policy, cut_anywhere, make_bucket_groups, with_codes
from megaforge.parallel.collectives import all_gather_single
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import FlatShard, optimizer_shard
from megaforge.parallel.linear_op import quantizer_of
from megaforge.parallel.param_spec import spec_of


class _Gather:
    """The flat parameters of one bucket, and the all-gather that is filling them."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.flat = torch.zeros(bucket.size, dtype=bucket.dtype, device=bucket.device)
        self.work: dist.Work | None = None

    def start(self) -> None:
        group = self.bucket.replicas.group
        if group is not None:
            own = self.bucket.own_slice(self.flat)
            self.work = all_gather_single(self.flat, own, group=group, async_op=True)

    @property
    def is_on_its_way(self) -> bool:
        """Whether the parameters are not all here."""
        return self.work is not None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None


class _CodeGather(_Gather):
    """Of a bucket of quantized parameters: their codes travel, packed, and products take them in place of the weights,
    of which a rank then has its own slice alone. What belongs to others is NaN, so that nobody reads it unnoticed.

    A code depends on its whole matrix, so the gather begins once every bucket is updated: before the first module that
    waits for parameters.
    """

    def __init__(self, bucket: Bucket) -> None:
        """
        Raises:
            UserError: products of a parameter need more than codes, or the codes differ in kind.
        """
        super().__init__(bucket)
        ops = [quantizer_of(parameter).op for parameter in bucket.parameters]
        self._kind = ops[0].code_kind
        if self._kind is None or any(op.code_kind != self._kind for op in ops):
            raise UserError(
                f"--zero-quantized-gather: products of {spec_of(bucket.parameters[0]).name} need more than codes, all "
                "of one kind, by the steps of whole matrices; leave it out, or quantize by --quantize-weights alone"
            )
        self._ops, self._due, self._began = ops, False, False
        self._arrived = torch.empty(0, dtype=torch.uint8)

    @property
    def is_on_its_way(self) -> bool:
        return self._due or super().is_on_its_way

    def start(self) -> None:
        self._due = self.bucket.replicas.group is not None

    def begin(self) -> None:
        """Sends, where that is due. Collective over all replicas, and over tp."""
        if not self._due or self._kind is None:
            return
        self._due = False
        codes = torch.zeros(self.bucket.slice_size, dtype=torch.int8, device=self.bucket.device)
        places = zip(
            self.bucket.parameters, self._ops, self.bucket.own_ranges(), self.bucket.own_views(codes), strict=True
        )
        for parameter, op, (start, stop), view in places:
            view.copy_(op.codes_within(parameter, start, stop))
        own = codes.view(torch.uint8) if self._kind == "int8" else pack_codes(codes.view(1, -1), self._kind).view(-1)
        self._arrived = own.new_empty(len(own) * self.bucket.replicas.size)
        if not self._began:
            self._began, kept = True, self.bucket.own_slice(self.flat).clone()
            self.flat.fill_(torch.nan)
            self.bucket.own_slice(self.flat).copy_(kept)
        self.work = all_gather_single(self._arrived, own, group=self.bucket.replicas.group, async_op=True)

    def wait(self) -> None:
        if self.work is None or self._kind is None:
            return
        super().wait()
        packed, self._arrived = self._arrived, self._arrived.new_empty(0)
        codes = packed.view(torch.int8)
        if self._kind != "int8":
            codes = unpack_codes(packed.view(1, -1), self._kind, self.bucket.size).view(-1)
        for op, view in zip(self._ops, self.bucket.views(codes), strict=True):
            op.take_codes(view)


class ShardedParameters:
    """Moves the trained parameters of ``module`` into flat buckets and gives each a ``share``: the range of it
    (:class:`FlatShard`) that this rank updates. Several modules are the chunks of one model (virtual stages).

    Made once, after the parameters have their initial values and before the optimizer and the gradient reducer.

    After an update the slices are gathered bucket by bucket in the order of the forward pass, and each module waits,
    in front of its own forward, for the buckets that hold its parameters. A module without a ``forward`` of its own
    is waited for by the one around it. Whoever reads parameters in another way calls :meth:`wait_for_parameters` first.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        ctx: ParallelContext,
        *,
        bucket_size: int = 25_000_000,
        overlap: bool = True,
        policy: Policy = cut_anywhere,
    ) -> None:
        """``policy``: how a bucket is cut into slices, see :func:`megaforge.parallel.buckets.make_bucket_groups`."""
        chunks = [module] if isinstance(module, nn.Module) else list(module)
        self.bucket_groups = make_bucket_groups(chunks, ctx, bucket_size, policy)
        self.overlap = overlap
        # In the order of the forward pass: chunks as they come, each from its first bucket to be used.
        self._gathers = [
            (_CodeGather if bucket.coded else _Gather)(bucket)
            for bucket_group in (self.bucket_groups[-1], *self.bucket_groups[:-1])
            for bucket in reversed(bucket_group)
        ]
        self._coded = [gather for gather in self._gathers if isinstance(gather, _CodeGather)]
        self._gather_of: dict[int, _Gather] = {}
        for gather in self._gathers:
            self._adopt(gather)
        if overlap or self._coded:
            for chunk in chunks:
                self._wait_before_forward(chunk)

    @property
    def buckets(self) -> list[Bucket]:
        """All of them, bucket_group by bucket_group."""
        return [bucket for bucket_group in self.bucket_groups for bucket in bucket_group]

    @torch.no_grad()
    def _adopt(self, gather: _Gather) -> None:
        """Makes the bucket's parameters views of its flat buffer."""
        bucket = gather.bucket
        ranges = bucket.own_ranges()
        for parameter, view, held in zip(bucket.parameters, bucket.views(gather.flat), ranges, strict=True):
            view.copy_(parameter)
            parameter.data = view
            parameter.__dict__["share"] = FlatShard(spec_of(parameter), *held)
            self._gather_of[id(parameter)] = gather

    def _wait_before_forward(self, module: nn.Module) -> None:
        """Registers the hooks; a module around one without a forward takes over that one's parameters."""
        waits: dict[nn.Module, dict[int, _Gather]] = {}

        def visit(current: nn.Module, around: nn.Module) -> None:
            if type(current).forward is not nn.Module.forward:
                around = current
            for parameter in current.parameters(recurse=False):
                if id(parameter) in self._gather_of:
                    waits.setdefault(around, {})[id(self._gather_of[id(parameter)])] = self._gather_of[id(parameter)]
            for child in current.children():
                visit(child, around)

        visit(module, module)
        for waiter, gathers in waits.items():
            waiter.register_forward_pre_hook(self._waiter(tuple(gathers.values())))

    def _waiter(self, gathers: tuple[_Gather, ...]) -> Any:
        """A forward pre-hook that waits for ``gathers``."""

        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._begin()
            for gather in gathers:
                gather.wait()

        return before_forward

    def _begin(self) -> None:
        for gather in self._coded:
            gather.begin()

    def own(self, parameter: nn.Parameter) -> Tensor:
        """This rank's range of ``parameter``, flattened [share]: a view of the model's memory."""
        share = optimizer_shard(parameter)
        if not isinstance(share, FlatShard):
            raise ValueError(f"{share.name} is not sharded")
        return parameter.detach().view(-1)[share.start : share.stop]

    def in_forward_order(self) -> list[Bucket]:
        """The buckets, from the first that a forward pass uses to the last."""
        return [gather.bucket for gather in self._gathers]

    def all_gather_parameters(self, bucket: Bucket | None = None) -> None:
        """Spreads what every rank has written into its own ranges, of one bucket or of all. Collective; returns before
        it is done where that overlaps with computation."""
        for gather in self._gathers:
            if bucket is None or gather.bucket is bucket:
                gather.start()
                if not self.overlap:
                    gather.wait()  # codes are put off nevertheless

    def wait_for_parameters(self) -> None:
        """Returns once every parameter is whole and up to date, or its codes are. Collective."""
        self._begin()
        for gather in self._gathers:
            gather.wait()

    def check_used_whole(self, parameter: Tensor) -> None:
        """Raises RuntimeError when a gradient reached ``parameter`` before anybody waited for its values: a forward
        pass read it past the hooks, and computed with what was there before."""
        if self._gather_of[id(parameter)].is_on_its_way:
            raise RuntimeError(
                f"{spec_of(parameter).name} was used before its new values were waited for: "
                "its module was not called as module(...); call wait() in front of that code"
            )


def shard_parameters(
    config: ParallelConfig,
    module: nn.Module | Sequence[nn.Module],
    ctx: ParallelContext,
    policy: Policy = cut_anywhere,
) -> ShardedParameters | None:
    """What ``--zero`` asks for; None at stage 0. ``module`` must be initialised, and have no optimizer yet; the
    ``policy`` is the optimizer's."""
    if config.zero_stage == 0:
        return None
    size, overlap = config.ddp_bucket_size, config.overlap_param_gather
    policy = with_codes(policy) if config.zero_quantized_gather else policy
    return ShardedParameters(module, ctx, bucket_size=size, overlap=overlap, policy=policy)
