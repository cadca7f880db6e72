"""The linear family and the embedding, split over tp as in Megatron-LM (arXiv 1909.08053).

Every product with a trained matrix is one of these layers: :class:`ColumnParallelLinear`, :class:`RowParallelLinear`,
:class:`GroupedLinear` (experts) and :class:`ReplicatedLinear`. They hold the matrix; their ``op``
(:mod:`megaforge.parallel.linear_op`) multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.kernels.grouped_mm import Runs
from megaforge.parallel.after_update import Update
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.init_rules import Constant, InitRule
from megaforge.parallel.linear_op import PLAIN, LinearOp
from megaforge.parallel.param_spec import ParamSpec, make_parameter, spec_of
from megaforge.parallel.region import TensorParallelRegion


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


class ReplicatedLinear(Linear):
    """``y = x W^T`` with a W that is whole on every rank. Inside a region each rank has a part of its gradient, as its
    spec says."""

    def __init__(self, ctx: ParallelContext, spec: ParamSpec, *, dtype: torch.dtype, transposed: bool = False) -> None:
        super().__init__(make_parameter(spec, ctx, dtype), transposed=transposed)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.op.apply(x, self.matrix)


class GroupedLinear(Linear):
    """Experts' matrices, ``y_n = x_n W_e^T`` for the rows n of expert e: the experts split over ep, and the rows or the
    columns of each matrix over etp. A split over the columns leaves partial sums over etp."""

    def __init__(self, ctx: ParallelContext, spec: ParamSpec, *, dtype: torch.dtype) -> None:
        super().__init__(make_parameter(spec, ctx, dtype))
        self.axis = ctx.etp if spec.shard_dim == 2 else None

    def forward(self, rows: Tensor, runs: Runs) -> Tensor:
        """[R, in], sorted by expert as ``runs`` says -> [R, out]."""
        return self.op.apply(rows, self.weight, axis=self.axis, runs=runs)


class ColumnParallelLinear(Linear):
    """``y = x W^T + b`` with the rows of W (the output features) split over tp.

    The input is inside a :class:`TensorParallelRegion`: every token, on every rank; with a ``region`` it is the
    residual stream, and the layer enters the region on its way in. ``parts`` names the logical matrices fused in W
    (q|k|v, gate|up); each is split on its own.
    """

    def __init__(
        self,
        ctx: ParallelContext,
        name: str,
        in_features: int,
        out_features: int,
        *,
        init: InitRule,
        region: TensorParallelRegion | None = None,
        bias: bool = False,
        parts: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        weight_decay: bool = True,
        kind: str = "other",
    ) -> None:
        weight = ParamSpec(
            f"{name}.weight",
            (out_features, in_features),
            init,
            shard_dim=0,
            parts=parts,
            weight_decay=weight_decay,
            kind=kind,
        )
        added = ParamSpec(
            f"{name}.bias", (out_features,), Constant(0.0), shard_dim=0, parts=parts, weight_decay=False, kind=kind
        )
        super().__init__(make_parameter(weight, ctx, dtype), make_parameter(added, ctx, dtype) if bias else None)
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out/tp]; with a region [s(/tp), b, in] -> [s, b, out/tp]."""
        if self.region is not None:
            return self.region.enter_linear(x, self.weight, self.bias, self.op)
        return self.op.apply(x, self.weight, self.bias)


class RowParallelLinear(Linear):
    """``y = x W^T + b`` with the columns of W (the input features) split over tp; leaves the ``region`` on its way out,
    or without one leaves partial sums over tp, to which no bias can be added."""

    def __init__(
        self,
        ctx: ParallelContext,
        name: str,
        in_features: int,
        out_features: int,
        *,
        init: InitRule,
        region: TensorParallelRegion | None,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        weight_decay: bool = True,
        kind: str = "other",
    ) -> None:
        weight = ParamSpec(
            f"{name}.weight", (out_features, in_features), init, shard_dim=1, weight_decay=weight_decay, kind=kind
        )
        added = ParamSpec(
            f"{name}.bias",
            (out_features,),
            Constant(0.0),
            tp_partial_grad=region is not None and region.sequence_parallel,
            weight_decay=False,
            kind=kind,
        )
        super().__init__(make_parameter(weight, ctx, dtype), make_parameter(added, ctx, dtype) if bias else None)
        self.axis: Axis = ctx.tp
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in/tp] -> residual stream [s(/tp), b, out], or partial sums [s, b, out] inside the region."""
        out = self.op.apply(x, self.weight, axis=self.axis)
        out = out if self.region is None else self.region.exit(out)
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token embedding whose rows are split over tp; a rank looks up its own rows and the sum over tp is the whole."""

    def __init__(
        self,
        ctx: ParallelContext,
        name: str,
        padded_vocab_size: int,
        hidden_size: int,
        *,
        init: InitRule,
        region: TensorParallelRegion,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.region = region
        spec = ParamSpec(f"{name}.weight", (padded_vocab_size, hidden_size), init, shard_dim=0, kind="embedding")
        self.weight = make_parameter(spec, ctx, dtype)
        self.sharded = ctx.tp.size > 1
        self.first_row = ctx.tp.rank * self.weight.shape[0]

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """int64 [b, s] -> residual stream [s(/tp), b, h]."""
        index = tokens_BS.transpose(0, 1) - self.first_row
        if not self.sharded:
            return F.embedding(index, self.weight)
        elsewhere = (index < 0) | (index >= self.weight.shape[0])
        own = F.embedding(index.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.region.exit(own)
