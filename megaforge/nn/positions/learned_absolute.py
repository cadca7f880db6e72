"""``learned_absolute``: a table of vectors that are added to the embedding."""

from __future__ import annotations

from typing import Any

from megaforge.config.attention_config import AttentionConfig
from megaforge.config.position_kind import PositionKind
from megaforge.errors import UserError


class LearnedAbsolute(PositionKind):
    """:class:`megaforge.nn.position_table.PositionTable`."""

    def check(self, cfg: AttentionConfig) -> None:
        if cfg.max_position_embeddings is None:
            raise UserError(
                f"--position-embedding-type {cfg.position_embedding_type}: it does not say how many positions are "
                "learned; add --max-position-embeddings N, at least --seq-length"
            )

    def build(self, layer: Any) -> Any:
        from megaforge.nn.position_table import PositionTable

        return PositionTable(layer)

    def longest(self, cfg: AttentionConfig) -> int | None:
        return cfg.max_position_embeddings


KIND = LearnedAbsolute()
