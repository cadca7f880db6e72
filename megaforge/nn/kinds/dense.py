"""``-``: the dense FFN."""

from __future__ import annotations

from typing import Any

from megaforge.config.config import Config
from megaforge.config.layer_kind import LayerKind


class Dense(LayerKind):
    """:class:`megaforge.nn.mlp.DenseFFN`."""

    title = "dense FFN"
    is_mixer = False
    in_megatron = True

    def split_over_tp(self, config: Config, world_size: int) -> list[tuple[str, int]]:
        return [(f"--ffn-hidden-size {config.model.ffn_size}", config.model.ffn_size)]

    def build(self, layer: Any) -> Any:
        from megaforge.nn.mlp import DenseFFN

        return DenseFFN(layer)


KIND = Dense()
