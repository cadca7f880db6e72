"""Norms of the residual stream, with statistics in fp32 (fp64 for fp64 input)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.kernels.pointwise import rms_norm
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.layer_context import LayerContext


class _StreamNorm(nn.Module):
    """A norm of the residual stream: a learned weight [h], and a bias where ``has_bias``, that stay in fp32."""

    has_bias = False

    def __init__(self, layer: LayerContext) -> None:
        super().__init__()
        self.epsilon = layer.cfg.norm_epsilon
        self.weight = _vector(layer, 1.0)
        if self.has_bias:
            self.bias = _vector(layer, 0.0)


class RMSNorm(_StreamNorm):
    """:func:`rms_norm` with a learned weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return rms_norm(x, self.weight, self.epsilon)


class LayerNorm(_StreamNorm):
    """Layer norm (Ba et al., arXiv 1607.06450) with weight and bias."""

    has_bias = True
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        wide = x.to(self.weight.dtype)
        return F.layer_norm(wide, self.weight.shape, self.weight, self.bias, self.epsilon).to(x.dtype)


def _vector(layer: LayerContext, value: float) -> nn.Parameter:
    """A norm lives on the residual stream: under sequence parallelism it sees only this rank's tokens."""
    partial = layer.region.sequence_parallel
    return layer.parameter(
        (layer.cfg.hidden_size,),
        Constant(value),
        tp_partial_grad=partial,
        weight_decay=False,
        keep_fp32=True,
        kind="norm",
    )


def make_norm(layer: LayerContext) -> RMSNorm | LayerNorm:
    """The norm that ``--normalization`` names, over the hidden size."""
    return RMSNorm(layer) if layer.cfg.normalization == "rmsnorm" else LayerNorm(layer)
