"""What a model knows of its tokens' positions. Needs no torch: the configuration is checked before torch is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaforge.config.attention_config import AttentionConfig


class PositionKind:
    """A value of ``--position-embedding-type``. A subclass overrides what differs; an instance is registered by its
    name, in any file that ``--extensions`` names::

        POSITION_EMBEDDINGS.register("sinusoidal", Sinusoidal())

    Attributes:
        settings: flags that shape it and nothing else (``model.rotary_base``): with another kind they do nothing.
    """

    settings: tuple[str, ...] = ()

    def check(self, cfg: AttentionConfig) -> None:
        """
        Raises:
            UserError: these numbers give no such positions.
        """

    def build(self, layer: Any) -> Any:
        """What adds positions to the embedding: a module of (residual stream [s(/tp), b, h], the micro-batch's
        :class:`megaforge.parallel.packed_sequence.PackedSequence`) -> the same shape. None: nothing does."""
        return None

    def longest(self, cfg: AttentionConfig) -> int | None:
        """Tokens of the longest sequence that has positions; None: there is no limit."""
        return None

    def rotation(self, cfg: AttentionConfig) -> Any:
        """What attention does to queries and keys: a function of (heads [s, b, heads, d], the micro-batch) -> the same
        shape. None: nothing."""
        return None


NONE = PositionKind()
