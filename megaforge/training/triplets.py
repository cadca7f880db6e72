"""Which triplets of AdaLoRA's adapters remain (Zhang et al., arXiv 2303.10512; as ``peft``'s RankAllocator counts).

A weight's sensitivity |w g| has a running mean and a running mean of its deviation from that; their product is the
weight's importance. A triplet's is that of its singular value, with the mean of its row of A and of its column of B.
Those of all adapters are compared, whichever rank holds them, and singular values beyond the budget become zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.adalora_config import AdaLoraConfig
from megaforge.errors import UserError
from megaforge.optim.main_parameters import MainParameter, MainParameters
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import Entry, FlatShard, optimizer_shard
from megaforge.parallel.param_spec import spec_of
from megaforge.peft.adalora import VALUES, singular_factors


class Budget(NamedTuple):
    """How many triplets a run has at each step.

    Attributes:
        first, last: at the beginning and at the end.
        warmup, final: the last step before it shrinks, and the first step of the final number.
        interval: steps between two choices.
    """

    first: int
    last: int
    warmup: int
    final: int
    interval: int

    @classmethod
    def of(cls, flags: AdaLoraConfig, ranks: Sequence[int], train_iters: int) -> Budget:
        """That of adapters of ``ranks`` in a run of ``train_iters`` steps.

        Raises:
            UserError: there are too few steps.
        """
        warmup = max(1, int(train_iters * flags.adalora_warmup_fraction))
        final = train_iters - int(train_iters * flags.adalora_final_fraction)
        if warmup >= final:
            raise UserError(
                f"--train-iters {train_iters}: --peft adalora has no step between the first {warmup} and the final "
                f"{train_iters - final}; train longer, or use a smaller --adalora-final-fraction"
            )
        last = sum(min(rank, flags.adalora_target_rank) for rank in ranks)
        return cls(sum(ranks), last, warmup, final, flags.adalora_interval)

    def at(self, step: int) -> int:
        """Triplets after ``step``, from 1: a cube of what is left of the time."""
        if step <= self.warmup:
            return self.first
        if step >= self.final:
            return self.last
        left = 1 - (step - self.warmup) / (self.final - self.warmup)
        return int((self.first - self.last) * left**3 + self.last)

    def chooses(self, step: int) -> bool:
        """Whether ``step`` decides anew which remain."""
        return step == self.final or (self.warmup < step < self.final and step % self.interval == 0)


class _Held(NamedTuple):
    """A parameter of an adapter.

    Attributes:
        main: its master.
        letter: A, B or E.
        scores: where its triplets are among those of all adapters.
    """

    main: MainParameter
    letter: str
    scores: slice


class Triplets:
    """Those of a whole model, and what this rank holds of them.

    Attributes:
        ranks: of each adapter of the model, one for each expert of a stack, in an order that no layout changes.
        kept: which triplets remain; float64 [triplets] of ones and zeros, the same on every rank.
    """

    def __init__(self, model: nn.Module, main: MainParameters, ctx: ParallelContext) -> None:
        """Collective."""
        self.ctx = ctx
        masters = {id(one.parameter): one for one in main.trained}
        found = list(singular_factors(model))
        values = [spec_of(adapter.values(factors)) for adapter, factors in found]
        everywhere: dict[str, tuple[int, ...]] = {}
        for part in exchange(ctx, {spec.name: spec.shape for spec in values}):
            everywhere |= part
        places, self.ranks, end = {}, list[int](), 0
        for name, (*stack, rank, _) in sorted(everywhere.items()):
            count = stack[0] if stack else 1
            places[name] = slice(end, end + count * rank)
            self.ranks += [rank] * count
            end += count * rank
        self.kept = torch.ones(end, dtype=torch.float64, device=ctx.device)
        self._held = [
            _Held(masters[id(getattr(adapter, factors.prefix + letter))], letter, places[spec.name])
            for (adapter, factors), spec in zip(found, values, strict=True)
            for letter in ("A", "B", VALUES)
        ]
        self._means = [(torch.zeros_like(one.main.master), torch.zeros_like(one.main.master)) for one in self._held]
        for means in self._means:
            for mean in means:
                mean.requires_grad_(False)

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Takes in the gradients of a step that has updated the weights."""
        for one, (sensitivity, deviation) in zip(self._held, self._means, strict=True):
            now = (one.main.master * one.main.grad).abs()
            sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
            deviation.mul_(beta2).add_((now - sensitivity).abs(), alpha=1 - beta2)

    @torch.no_grad()
    def choose(self, count: int) -> None:
        """The ``count`` most important remain; of equals the first. Collective."""
        scores = torch.zeros_like(self.kept)
        for one, means in zip(self._held, self._means, strict=True):
            _add_importance(one, means[0].double() * means[1].double(), scores[one.scores], self.ctx)
        if self.ctx.world.size > 1:
            dist.all_reduce(scores, group=self.ctx.world.group)
        order = scores.sort(descending=True, stable=True).indices
        self.kept.zero_()[order[:count]] = 1.0

    @torch.no_grad()
    def drop(self) -> None:
        """Singular values of the others become zero, in masters and weights. All weights have to be there."""
        for one in self._held:
            if one.letter != VALUES:
                continue
            spec = spec_of(one.main.parameter)
            local = spec.take_local(self.kept[one.scores].view(*spec.shape), self.ctx)
            one.main.scale_rows(local.reshape(-1))
            one.main.parameter.detach().mul_(local.to(one.main.parameter.dtype))

    def entries(self) -> Iterator[Entry]:
        """What a checkpoint keeps."""
        yield "kept", None, self.kept
        for one, means in zip(self._held, self._means, strict=True):
            for name, mean in zip(("sensitivity", "deviation"), means, strict=True):
                yield f"{name}.{one.main.spec.name}", optimizer_shard(one.main.parameter), mean


def _add_importance(one: _Held, values: Tensor, scores: Tensor, ctx: ParallelContext) -> None:
    """Adds to ``scores`` [triplets of the adapter] what this rank holds of its parameter's share in them."""
    held, spec = optimizer_shard(one.main.parameter), spec_of(one.main.parameter)
    if not held.is_first_copy(ctx):
        return
    along = -2 if one.letter == "B" else -1  # the features of a triplet
    by_triplet = scores.view(*spec.shape[:-2], -1)
    for piece in held.pieces(ctx):
        box = list(piece.global_box)
        del box[along]
        place = tuple(slice(start, stop) for start, stop in box)
        by_triplet[place] += piece.local_view(values).sum(along) / spec.shape[along]


class Orthogonality:
    """The penalty of AdaLoRA: ``weight`` times the mean of ||A A^T - I|| and ||B^T B - I|| over all adapters."""

    def __init__(self, model: nn.Module, main: MainParameters, ctx: ParallelContext, weight: float, count: int) -> None:
        """``count``: the adapters of the whole model."""
        self.ctx, self.factor = ctx, weight / (2 * max(1, count))
        masters = {id(one.parameter): one for one in main.trained}
        self._factors = [
            (masters[id(getattr(adapter, factors.prefix + letter))], letter == "B")
            for adapter, factors in singular_factors(model)
            for letter in "AB"
        ]

    @torch.no_grad()
    def add_gradient(self, scale: float) -> Tensor:
        """Adds the gradient of the penalty, times ``scale``, to the reduced gradients. All weights have to be there.
        Collective over the axes that factors are split over.

        Returns:
            The penalty's part of this rank (fp64, 0-d): the sum over ranks is the whole.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.ctx.device)
        for (main, turned), product in zip(self._factors, self._products(), strict=True):
            beyond = product - torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
            norm = beyond.square().sum((-2, -1), keepdim=True).sqrt()
            weight = main.parameter.detach().to(beyond.dtype)
            unit = beyond / norm.masked_fill(norm == 0, 1)
            gradient = (2 * self.factor * scale) * (weight @ unit if turned else unit @ weight)
            held, spec = optimizer_shard(main.parameter), spec_of(main.parameter)
            if isinstance(held, FlatShard):
                main.grad.add_(gradient.reshape(-1)[held.start : held.stop])
            else:
                main.grad.add_(gradient)
            if spec.is_first_copy(self.ctx):
                shares = 1 if spec.shard_dim is None else self.ctx.axis(spec.shard_axis).size
                total += self.factor * norm.sum().double() / shares
        return total

    def _products(self) -> list[Tensor]:
        """A A^T, or B^T B, of every factor, whole, in fp32 (fp64 for fp64 models)."""
        found, split = list[Tensor](), dict[str, list[Tensor]]()
        for main, turned in self._factors:
            weight, spec = main.parameter.detach(), spec_of(main.parameter)
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            found.append(weight.mT @ weight if turned else weight @ weight.mT)
            if spec.shard_dim is not None and self.ctx.axis(spec.shard_axis).size > 1:
                split.setdefault(spec.shard_axis, []).append(found[-1])
        for axis, parts in split.items():
            together = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(together, group=self.ctx.axis(axis).group)
            for part, summed in zip(parts, together.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view(part.shape))
        return found
