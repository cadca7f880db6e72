"""The linear family and the embedding, split over tp as in Megatron-LM (arXiv 1909.08053).

Every product with a trained matrix is one of these layers: :class:`ColumnParallelLinear`, :class:`RowParallelLinear`,
:class:`GroupedLinear` (experts) and :class:`ReplicatedLinear`. They hold the matrix; their ``op``
(:mod:`megaforge.parallel.linear_op`) multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.kernels.grouped_mm import Runs
from megaforge.parallel.after_update import Update
from megaforge.parallel.context import Axis
from megaforge.parallel.init_rules import Constant, InitRule
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.linear_op import PLAIN, LinearOp
from megaforge.parallel.param_spec import spec_of


class Linear(nn.Module):
    """What the family has in common.

    Attributes:
        weight: this rank's shard of the matrix [out, in], or of a stack of them [E, out, in].
        bias: this rank's shard of [out], or None.
        op: what multiplies; a converter may set another.
        in_features, out_features: of the whole matrix.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, *, transposed: bool = False) -> None:
        """``transposed``: the matrix is stored as [in, out], as RWKV-LM stores low-rank maps."""
        super().__init__()
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self.op: LinearOp = PLAIN
        shape = spec_of(weight).shape[-2:]
        self.out_features, self.in_features = reversed(shape) if transposed else shape

    @property
    def matrix(self) -> Tensor:
        """The shard as [(E,) out, in]."""
        return self.weight.t() if self.transposed else self.weight

    def after_update(self, update: Update) -> None:
        self.op.after_update(self.matrix, update.ctx)

    def extra_repr(self) -> str:
        *stack, rows, columns = self.matrix.shape
        local = f"{rows} x {columns}" if not stack else f"{stack[0]} of {rows} x {columns}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, local={local}, op={type(self.op).__name__}"


def is_whole(model: nn.Module) -> bool:
    """Whether ``model`` has all layers, so that what a converter does not find there is nowhere; a pipeline stage may
    have none of a kind."""
    return bool(getattr(model, "is_first", True) and getattr(model, "is_last", True))


def linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every layer of the linear family in ``model``, with its path: ``layers.3.mixer.key``."""
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            yield path, module


class ReplicatedLinear(Linear):
    """``y = x W^T + b`` with a W that is whole on every rank. Inside a region each rank has a part of its gradient, as
    its spec says."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.op.apply(x, self.matrix, self.bias)


class GroupedLinear(Linear):
    """Experts' matrices, ``y_n = x_n W_e^T`` for the rows n of expert e: the experts split over ep, and the rows
    (``split`` 1) or the columns (2) of each matrix over etp. A split over the columns leaves partial sums over etp."""

    def __init__(
        self,
        layer: LayerContext,
        in_features: int,
        out_features: int,
        *,
        init: InitRule,
        split: int,
        parts: tuple[int, ...] = (),
        kind: str = "moe",
    ) -> None:
        shape = (layer.cfg.num_experts, out_features, in_features)
        declared: dict[str, Any] = {"shard_dim": split, "shard_axis": "etp", "parts": parts, "kind": kind}
        declared |= {"expert_dim": 0, "experts_per_token": layer.cfg.moe_router_topk}
        super().__init__(layer.parameter(shape, init, role="matrix", **declared))
        self.axis = layer.ctx.etp if split == 2 else None

    def forward(self, rows: Tensor, runs: Runs) -> Tensor:
        """[R, in], sorted by expert as ``runs`` says -> [R, out]."""
        return self.op.apply(rows, self.weight, axis=self.axis, runs=runs)


class ColumnParallelLinear(Linear):
    """``y = x W^T + b`` with the rows of W (the output features) split over tp.

    The input is inside a :class:`megaforge.parallel.region.TensorParallelRegion`: every token, on every rank; with
    ``enter`` it is the residual stream, and the layer enters the region on its way in. ``parts`` names the logical
    matrices fused in W (q|k|v, gate|up); each is split on its own.
    """

    def __init__(
        self,
        layer: LayerContext,
        in_features: int,
        out_features: int,
        *,
        init: InitRule,
        enter: bool = False,
        bias: bool = False,
        transposed: bool = False,
        **declared: Any,
    ) -> None:
        """``declared``: what else :class:`megaforge.parallel.param_spec.ParamSpec` says of the matrix."""
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        weight = layer.parameter(shape, init, shard_dim=1 if transposed else 0, role="matrix", **declared)
        of_bias = {**declared, "shard_dim": 0, "weight_decay": False}
        added = layer.parameter((out_features,), Constant(0.0), **of_bias) if bias else None
        super().__init__(weight, added, transposed=transposed)
        self.region = layer.region if enter else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out/tp]; where it enters the region [s(/tp), b, in] -> [s, b, out/tp]."""
        return self.op.apply(x, self.matrix, self.bias, region=self.region)


class RowParallelLinear(Linear):
    """``y = x W^T + b`` with the columns of W (the input features) split over tp; leaves the region on its way out, or
    without ``reduce`` leaves partial sums over tp, to which no bias can be added."""

    def __init__(
        self,
        layer: LayerContext,
        in_features: int,
        out_features: int,
        *,
        init: InitRule,
        reduce: bool = True,
        bias: bool = False,
        kind: str = "other",
    ) -> None:
        if bias and not reduce:
            raise ValueError("a bias cannot be added to partial sums: every rank of tp would add it")
        weight = layer.parameter((out_features, in_features), init, shard_dim=1, role="matrix", kind=kind)
        declared: dict[str, Any] = {"tp_partial_grad": layer.region.sequence_parallel, "kind": kind}
        added = layer.parameter((out_features,), Constant(0.0), weight_decay=False, **declared) if bias else None
        super().__init__(weight, added)
        self.axis: Axis = layer.ctx.tp
        self.region = layer.region if reduce else None

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in/tp] -> residual stream [s(/tp), b, out], or partial sums [s, b, out] inside the region."""
        out = self.op.apply(x, self.weight, axis=self.axis, leaves=self.region)
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token embedding whose rows are split over tp; a rank looks up its own rows and the sum over tp is the whole."""

    def __init__(self, layer: LayerContext, *, init: InitRule, weight: nn.Parameter | None = None) -> None:
        """``weight``: this rank's rows, where they are there already."""
        super().__init__()
        self.region = layer.region
        shape = (layer.cfg.padded_vocab_size(), layer.cfg.hidden_size)
        if weight is None:
            weight = layer.parameter(shape, init, shard_dim=0, role="lookup", kind="embedding")
        self.weight = weight
        self.sharded = layer.ctx.tp.size > 1
        self.first_row = layer.ctx.tp.rank * self.weight.shape[0]

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """int64 [b, s] -> residual stream [s(/tp), b, h]."""
        index = tokens_BS.transpose(0, 1) - self.first_row
        if not self.sharded:
            return F.embedding(index, self.weight)
        elsewhere = (index < 0) | (index >= self.weight.shape[0])
        own = F.embedding(index.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.region.exit(own)
