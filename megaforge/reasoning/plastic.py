"""Plastic adapters (``--peft plastic``): low-rank fast weights that change while a document is read.

Beside a layer ``z = W x + b`` stands ``y = z + alpha clip(B) u``, where u is the unit vector along A x. A is trained.
B begins each document as zero and is no parameter: after every ``--plastic-chunk`` tokens

    B <- decay B + rate x the mean over these tokens of the rule (:mod:`megaforge.reasoning.rules`).

A token sees the B of the chunks before its own, so that training, evaluation and generation agree, and gradients reach
A through everything that was written. Fast weights are as in Ba et al. (arXiv 1610.06258), the clipped trace as in
Miconi et al. (Backpropamine, arXiv 2002.10585).

B is split over tp as the layer's output features are. Where tokens are split (cp; sequence parallelism behind a row
layer), what a chunk writes is summed over the ranks, in both passes, so that every rank has every B that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.kernels.grouped_mm import Runs
from megaforge.nn.sublayer import LayerOutput
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.layers import ColumnParallelLinear, GroupedLinear, Linear, RowParallelLinear, is_whole
from megaforge.parallel.linear_op import LinearOp
from megaforge.parallel.mappings import copy_to_tensor_parallel, reduce_from_tensor_parallel, scale_gradient
from megaforge.parallel.region import TensorParallelRegion
from megaforge.peft.adapter import AdaptedOp, Adapter, Declaration, Factors, inner_features
from megaforge.peft.freeze import freeze_all
from megaforge.peft.targets import Target, chosen
from megaforge.reasoning.correlation import CorrelationLoss, correlation
from megaforge.reasoning.fast_weights import FastWeights, PlasticState
from megaforge.reasoning.rules import Step
from megaforge.reasoning.segments import Segments, segments_of
from megaforge.registry import PLASTIC_RULES


class Plasticity(NamedTuple):
    """How fast weights change; see :class:`megaforge.config.plastic_config.PlasticConfig`."""

    rule: Callable[[Step], Tensor]
    alpha: float
    rate: float
    decay: float
    clamp: float
    correlated: bool = False


class PlasticAdapter(Adapter):
    """The fast weights beside one layer.

    Attributes:
        segments: of the present micro-batch.
        memory: where sequences go on, and what they are left with, for each of ``factors``; None: they begin here, and
            nothing is left.
        losses: of each of ``factors``, the correlation objective of the present micro-batch; none where nobody asks.
    """

    def __init__(self, layer: Linear, factors: Sequence[Factors], ctx: ParallelContext, plasticity: Plasticity) -> None:
        super().__init__(layer, factors, ctx)
        self.plasticity = plasticity
        self.splits_output = isinstance(layer, ColumnParallelLinear)
        self.is_whole = not isinstance(layer, ColumnParallelLinear | RowParallelLinear)
        self.losses: list[Tensor] = []
        self.segments: Segments | None = None
        self.memory: Sequence[FastWeights] | None = None

    def declarations(self, layer: Linear, factors: Factors) -> Mapping[str, Declaration]:
        return {"A": super().declarations(layer, factors)["A"]}  # B is no parameter

    def added(
        self, x: Tensor, out: Tensor, region: TensorParallelRegion | None, leaves: TensorParallelRegion | None
    ) -> Tensor:
        """What there is to add to the layer's output ``out`` [s', b, out'], given its input; see
        :meth:`megaforge.parallel.linear_op.LinearOp.apply`."""
        assert self.segments is not None
        places, counts, made = self.segments.places_SB, self.segments.counts_SB, []
        scattered = leaves is not None and leaves.sequence_parallel
        if scattered:
            assert leaves is not None
            places, counts = leaves.own(places), leaves.own(counts)
        axes = (self.ctx.cp, self.ctx.tp) if scattered else (self.ctx.cp,)
        for number, factors in enumerate(self.factors):
            first = getattr(self, f"{factors.prefix}A")
            wide = torch.promote_types(out.dtype, torch.float32)
            u = F.normalize(inner_features(x, first, region, leaves).to(wide), dim=-1)
            z = out[..., self.local_rows(factors)].to(wide)
            memory = None if self.memory is None else self.memory[number]
            read, loss = self._read(z, u, (places, counts), memory, axes)
            made.append(read.to(out.dtype))
            if loss is not None:
                self.losses.append(self._over_ranks(loss, scattered))
        return self.placed(made)

    def _over_ranks(self, loss: Tensor, scattered: bool) -> Tensor:
        """Summed over tp, where its ranks have features or tokens of their own; each rank's gradient is of its own."""
        if scattered or self.splits_output:
            return reduce_from_tensor_parallel(loss, self.ctx.tp)
        return scale_gradient(loss, 1 / self.ctx.tp.size) if self.is_whole else loss

    def _read(
        self, z: Tensor, u: Tensor, where: tuple[Tensor, Tensor], memory: FastWeights | None, axes: tuple[Axis, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """alpha clip(B) u of every token [s', b, out'], and what the tokens write; and their correlation objective.

        Args:
            where: the tokens' places and which of them count, [s', b] each.
        """
        segments, how, (places, counted) = self.segments, self.plasticity, where
        assert segments is not None
        z, u = segments.spread(z, places), segments.spread(u, places)
        tokens, fast = segments.tokens_BK, z.new_zeros(len(z), z.shape[-1], u.shape[-1])
        if memory is not None and memory.fast is not None:
            z, u, tokens, fast = memory.continued(z, u, tokens)
        befores = self._written(z, u, fast, tokens, axes)
        if memory is not None:
            memory.leave(befores, z, u, tokens, segments)
        loss = None
        if how.correlated and self.training:
            counts, shrink = segments.spread(counted.to(z.dtype)[..., None], places), (1 - how.decay) / (2 * how.rate)
            loss = correlation(befores, z, u, counts, shrink)
        seen = how.alpha * befores.clamp(-how.clamp, how.clamp)
        return segments.gather(u @ seen.mT, places), loss

    def _written(self, z: Tensor, u: Tensor, fast: Tensor, tokens_BK: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        """[b, K, out', r]: B in front of each segment, the first time ``fast``."""
        segments, how = self.segments, self.plasticity
        assert segments is not None
        befores, last = [fast], segments.number - 1
        zu = _over(z.mT @ u, axes) if last else z  # of one segment nobody reads what it writes
        squares = cache(lambda: _over(u.mT @ u, axes))  # not every rule asks for them
        over_tokens = partial(_over, axes=axes)
        over_features = partial(_over, axes=(self.ctx.tp,) if self.splits_output else ())
        share_BK = (how.rate / tokens_BK.clamp(min=1).to(z.dtype))[..., None, None]
        for k in range(last):
            given = (fast, how.clamp, how.alpha, zu[:, k], partial(_segment, squares, k), z[:, k])
            step = Step(*given, over_tokens=over_tokens, over_features=over_features)
            fast = torch.addcmul(how.decay * fast, how.rule(step), share_BK[:, k])
            if segments.parted:
                fast = fast.masked_fill(segments.fresh_BK[:, k + 1, None, None], 0)
            befores.append(fast)
        return torch.stack(befores, 1)


def _segment(of_all: Callable[[], Tensor], k: int) -> Tensor:
    return of_all()[:, k]


def _over(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Sums over ranks of which each uses the sum for tokens or features of its own: summed in both passes."""
    for axis in axes:
        x = copy_to_tensor_parallel(reduce_from_tensor_parallel(x, axis), axis)
    return x


class PlasticOp(AdaptedOp):
    """Another op, and what fast weights add to its product."""

    def __init__(self, base: LinearOp, adapter: PlasticAdapter) -> None:
        super().__init__(base, adapter)
        self.plastic = adapter

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        axis: Axis | None = None,
        region: TensorParallelRegion | None = None,
        leaves: TensorParallelRegion | None = None,
        runs: Runs | None = None,
    ) -> Tensor:
        out = self.base.apply(x, weight, bias, axis=axis, region=region, leaves=leaves, runs=runs)
        return out + self.plastic.added(x, out, region, leaves)


def plastic_lora(model: nn.Module, ctx: ParallelContext) -> None:
    """The converter: fast weights beside the matrices that ``--peft-targets`` names, but for experts'; all but their A
    is frozen.

    Raises:
        UserError: ``--peft-targets`` names nothing, or experts alone, of a whole model; or the rank is larger than the
            matrix.
    """
    cfg = cast(ModelConfig, model.cfg)
    targets = [target for target in chosen(model, "--peft-targets", cfg.peft_targets) if _can_be(target)]
    if not targets and is_whole(model):
        raise UserError(
            f"--peft-targets {' '.join(cfg.peft_targets)}: plastic adapters stand beside dense matrices, not experts'; "
            "name some of attention, rwkv, mamba or ffn"
        )
    freeze_all(model)
    how = Plasticity(
        *(PLASTIC_RULES.get(cfg.plastic_rule), cfg.plastic_alpha, cfg.plastic_rate),
        *(cfg.plastic_decay, cfg.plastic_clamp, cfg.plastic_correlation > 0),
    )
    for _, group in groupby(targets, key=lambda target: target.path):
        adapt(list(group), cfg.plastic_rank, ctx, how)
    for module in model.modules():
        for _, sublayer in getattr(module, "sublayers", ()):
            within = [adapter for _, adapter in adapters(sublayer)]
            if within:
                _remember(sublayer, within, cfg.plastic_chunk)


def adapt(targets: Sequence[Target], rank: int, ctx: ParallelContext, how: Plasticity) -> PlasticAdapter:
    """Puts fast weights beside the layer that all ``targets`` are of."""
    factors, layer = [], targets[0].layer
    for target in targets:
        start, stop = target.rows
        if rank > (most := min(stop - start, layer.in_features)):
            raise UserError(
                f"--plastic-rank {rank}: the matrix {target.name} is {stop - start} x {layer.in_features}; use at most "
                f"{most}"
            )
        factors.append(Factors(target.part, rank, how.alpha, start, stop))
    adapter = PlasticAdapter(layer, factors, ctx, how)
    layer.add_module("plastic", adapter)
    layer.op = PlasticOp(layer.op, adapter)
    return adapter


def adapters(model: nn.Module) -> Iterator[tuple[str, PlasticAdapter]]:
    """Every adapter, and the path of its layer."""
    for path, module in model.named_modules():
        if isinstance(module, PlasticAdapter):
            yield path.rpartition(".")[0], module


def _can_be(target: Target) -> bool:
    """Experts see tokens out of their order, and a shared one gives partial sums."""
    layer = target.layer
    partial_sums = isinstance(layer, RowParallelLinear) and layer.region is None
    return not isinstance(layer, GroupedLinear) and not partial_sums


def _remember(sublayer: nn.Module, within: Sequence[PlasticAdapter], size: int) -> None:
    """A mixer or FFN whose adapters learn what each call's tokens are, and whose memory has their fast weights."""
    sublayer.register_forward_pre_hook(_Before(within, size))
    sublayer.register_forward_hook(partial(_behind, within))
    made = sublayer.new_state
    number = sum(len(adapter.factors) for adapter in within)

    def new_state() -> PlasticState:
        return PlasticState(made(), [FastWeights() for _ in range(number)])  # type: ignore[operator]

    sublayer.new_state = new_state  # type: ignore[assignment]


def _behind(within: Sequence[PlasticAdapter], module: nn.Module, args: tuple[Any, ...], out: LayerOutput) -> Any:
    """After a sublayer was called: what its adapters add to the loss leaves with what it gives."""
    sums = [loss for adapter in within for loss in adapter.losses]
    if not sums:
        return out
    assert out.losses is None, "experts have no fast weights"
    return out._replace(losses=CorrelationLoss(sums))


class _Before:
    """Before a sublayer is called: takes the fast weights out of its memory, and tells the adapters."""

    def __init__(self, within: Sequence[PlasticAdapter], size: int) -> None:
        self.within, self.size = within, size

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, info, *rest = args
        state = rest[1] if len(rest) > 1 and isinstance(rest[1], PlasticState) else None
        key = ("segments of fast weights", self.size)
        if key not in info.cache:  # all layers of a call are at the same places of the same documents
            info.cache[key] = segments_of(info, self.size, None if state is None else state.fast[0].open)
        memory = iter(() if state is None else state.fast)
        for adapter in self.within:
            adapter.segments = info.cache[key]
            adapter.losses = []
            adapter.memory = None if state is None else [next(memory) for _ in adapter.factors]
        if state is not None:
            rest[1] = state.inner
        return (x, info, *rest)
