"""The expert that sees every token, whatever the router says."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from megaforge.nn.activations import activate
from megaforge.nn.mlp import inner_parts
from megaforge.nn.norms import make_sub_norm
from megaforge.parallel.init_rules import InitRule
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ColumnParallelLinear, RowParallelLinear


class SharedExpert(nn.Module):
    """The FFN of ``--moe-shared-expert-intermediate-size`` that every token goes to, whatever its router says
    (DeepSeekMoE, arXiv 2401.06066); laid out over tp like a dense FFN."""

    def __init__(self, layer: LayerContext, init: tuple[InitRule, InitRule]) -> None:
        super().__init__()
        hidden = layer.cfg.hidden_size
        cfg = dataclasses.replace(layer.cfg, ffn_hidden_size=layer.cfg.moe_shared_expert_intermediate_size)
        self.activation, parts = cfg.activation, inner_parts(cfg)
        self.up = ColumnParallelLinear(layer, hidden, sum(parts), init=init[0], parts=parts, kind="ffn")
        self.sub_norm = make_sub_norm(layer, cfg.ffn_size)
        self.down = RowParallelLinear(layer, cfg.ffn_size, hidden, init=init[1], reduce=False, kind="ffn")

    def forward(self, x: Tensor) -> Tensor:
        """Every token [s, b, h], inside the region -> partial sums over tp [s, b, h]."""
        return self.down(self.sub_norm(activate(self.activation, self.up(x))))
