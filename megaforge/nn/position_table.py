"""Learned absolute positions (Gehring et al., arXiv 1705.03122; so in GPT-2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.packed_sequence import PackedSequence


class PositionTable(nn.Module):
    """Adds to each token's embedding a vector of its position in its document. The table is whole on every rank, as in
    Megatron-LM; under sequence parallelism a rank sees only its own tokens."""

    def __init__(self, layer: LayerContext) -> None:
        super().__init__()
        cfg, self.region = layer.cfg, layer.region
        assert cfg.max_position_embeddings is not None
        shape, init = (cfg.max_position_embeddings, cfg.hidden_size), Normal(cfg.init_std * cfg.init_std_scale)
        partial = layer.region.sequence_parallel
        self.weight = layer.parameter(shape, init, role="lookup", kind="embedding", tp_partial_grad=partial)

    def forward(self, x: Tensor, info: PackedSequence) -> Tensor:
        """Embeddings [s(/tp), b, h] -> the same shape."""
        return x + F.embedding(self.region.own(info.position_ids_BS.t()), self.weight)
