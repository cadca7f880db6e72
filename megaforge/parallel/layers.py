"""Linear layers and the embedding, split over tp as in Megatron-LM (arXiv 1909.08053)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Constant, InitRule
from megaforge.parallel.param_spec import ParamSpec, make_parameter
from megaforge.parallel.region import TensorParallelRegion


class ColumnParallelLinear(nn.Module):
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
        super().__init__()
        self.region = region
        weight = ParamSpec(
            f"{name}.weight",
            (out_features, in_features),
            init,
            shard_dim=0,
            parts=parts,
            weight_decay=weight_decay,
            kind=kind,
        )
        self.weight = make_parameter(weight, ctx, dtype)
        self.bias: nn.Parameter | None = None
        if bias:
            spec = ParamSpec(
                f"{name}.bias", (out_features,), Constant(0.0), shard_dim=0, parts=parts, weight_decay=False, kind=kind
            )
            self.bias = make_parameter(spec, ctx, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out/tp]; with a region [s(/tp), b, in] -> [s, b, out/tp]."""
        if self.region is not None:
            return self.region.enter_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """``y = x W^T + b`` with the columns of W (the input features) split over tp; leaves the region on its way out."""

    def __init__(
        self,
        ctx: ParallelContext,
        name: str,
        in_features: int,
        out_features: int,
        *,
        init: InitRule,
        region: TensorParallelRegion,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        weight_decay: bool = True,
        kind: str = "other",
    ) -> None:
        super().__init__()
        self.region = region
        weight = ParamSpec(
            f"{name}.weight", (out_features, in_features), init, shard_dim=1, weight_decay=weight_decay, kind=kind
        )
        self.weight = make_parameter(weight, ctx, dtype)
        self.bias: nn.Parameter | None = None
        if bias:
            spec = ParamSpec(
                f"{name}.bias",
                (out_features,),
                Constant(0.0),
                tp_partial_grad=region.sequence_parallel,
                weight_decay=False,
                kind=kind,
            )
            self.bias = make_parameter(spec, ctx, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in/tp] -> residual stream [s(/tp), b, out]."""
        out = self.region.exit(F.linear(x, self.weight))
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
