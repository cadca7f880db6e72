"""``rope``: queries and keys rotate with their positions."""

from __future__ import annotations

from typing import Any

from megaforge.config.attention_config import AttentionConfig
from megaforge.config.position_kind import PositionKind


class RotaryKind(PositionKind):
    """:class:`megaforge.nn.rope.Rotary`."""

    settings = tuple(
        f"model.{name}"
        for name in (
            *("rotary_base", "rotary_percent", "rotary_interleaved", "rotary_seq_len_interpolation_factor"),
            "use_rope_scaling",
        )
    )

    def rotation(self, cfg: AttentionConfig) -> Any:
        from megaforge.nn.rope import Rotary

        return Rotary.of(cfg)


KIND = RotaryKind()
