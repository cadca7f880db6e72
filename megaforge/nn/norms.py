"""Norms of the residual stream and in front of projections, with statistics in fp32 (fp64 for fp64 input)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megaforge.kernels.grouped_mm import Runs
from megaforge.kernels.pointwise import layer_norm, rms_norm, stream_layer_norm, stream_rms_norm
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.sharded_norm import sharded_rms_norm
from megaforge.registry import NORMS


class _Norm(nn.Module):
    """A norm of the residual stream, or of ``size`` other features of which each rank has all: a learned weight, and a
    bias where ``has_bias``, that stay in fp32."""

    has_bias = False
    takes_update = True  # see forward

    def __init__(self, layer: LayerContext, size: int | None = None, **declared: Any) -> None:
        """``declared``: of the weight, where it is not one of the residual stream: that lives outside the region, where
        under sequence parallelism it sees only this rank's tokens."""
        super().__init__()
        self.epsilon = layer.cfg.norm_epsilon
        shape = (layer.cfg.hidden_size if size is None else size,)
        partial = {"tp_partial_grad": layer.region.sequence_parallel, "weight_decay": False}
        declared = {**partial, **declared, "keep_fp32": True, "kind": "norm"}
        self.weight = layer.parameter(shape, Constant(1.0), **declared)
        if self.has_bias:
            self.bias = layer.parameter(shape, Constant(0.0), **{**declared, "weight_decay": False})


class RMSNorm(_Norm):
    """:func:`rms_norm` with a learned weight."""

    def forward(self, x: Tensor, *update: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., h] -> [..., h]; with an ``update`` as :func:`stream_rms_norm`."""
        if update:
            return stream_rms_norm(x, update[0], self.weight, self.epsilon)
        return rms_norm(x, self.weight, self.epsilon)


class LayerNorm(_Norm):
    """:func:`layer_norm` with a learned weight and bias."""

    has_bias = True
    bias: nn.Parameter

    def forward(self, x: Tensor, *update: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., h] -> [..., h]; with an ``update`` as :func:`stream_layer_norm`."""
        if update:
            return stream_layer_norm(x, update[0], self.weight, self.bias, self.epsilon)
        return layer_norm(x, self.weight, self.bias, self.epsilon)


class SubNorm(nn.Module):
    """An RMS norm in front of a projection out of a tensor-parallel region, over features that are split over tp
    (SubLN: Wang et al., arXiv 2210.06423; so placed in BitNet b1.58 2B4T)."""

    def __init__(self, layer: LayerContext, width: int) -> None:
        super().__init__()
        self.epsilon, self.axis = layer.cfg.norm_epsilon, layer.ctx.tp
        declared: dict[str, Any] = {"weight_decay": False, "keep_fp32": True, "kind": "norm"}
        self.weight = layer.parameter((width,), Constant(1.0), shard_dim=0, **declared)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width/tp] -> [..., width/tp]."""
        return sharded_rms_norm(x, self.weight, self.epsilon, self.axis)


class ExpertSubNorm(nn.Module):
    """A :class:`SubNorm` for each expert, its features split over etp."""

    def __init__(self, layer: LayerContext, width: int) -> None:
        super().__init__()
        self.epsilon, self.axis = layer.cfg.norm_epsilon, layer.ctx.etp
        declared: dict[str, Any] = {"weight_decay": False, "keep_fp32": True, "kind": "norm"}
        declared |= {"expert_dim": 0, "experts_per_token": layer.cfg.moe_router_topk}
        shape = (layer.cfg.num_experts, width)
        self.weight = layer.parameter(shape, Constant(1.0), shard_dim=1, shard_axis="etp", **declared)

    def forward(self, rows: Tensor, runs: Runs) -> Tensor:
        """[R, width/etp], sorted by expert -> the same."""
        experts = runs.experts(len(rows))
        return sharded_rms_norm(rows, self.weight[experts], self.epsilon, self.axis)


def make_sub_norm(layer: LayerContext, width: int) -> nn.Module:
    """What ``--sub-norm`` asks for in front of an output or down projection of ``width`` input features."""
    return SubNorm(layer, width) if layer.cfg.sub_norm else nn.Identity()


def make_norm(layer: LayerContext) -> nn.Module:
    """The norm that ``--normalization`` names, over the hidden size."""
    norm: nn.Module = NORMS.get(layer.cfg.normalization)(layer)
    return norm


def make_head_norm(layer: LayerContext) -> nn.Module:
    """The same norm over each head, for ``--qk-layernorm`` (Henry et al., arXiv 2010.04245; Dehghani et al., arXiv
    2302.05442): one weight for all heads, of which a rank of tp sees its own."""
    cfg = layer.cfg
    declared = {"tp_partial_grad": True, "weight_decay": cfg.apply_wd_to_qk_layernorm}
    norm: nn.Module = NORMS.get(cfg.normalization)(layer, cfg.head_dim, **declared)
    return norm
