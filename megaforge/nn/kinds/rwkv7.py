"""``R``: RWKV-7's time-mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megaforge.config.config import Config
from megaforge.config.layer_kind import LayerKind
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError


class RWKV7(LayerKind):
    """:class:`megaforge.nn.rwkv7.RWKV7TimeMix`. Its first layer makes v_first, which the later ones mix in."""

    title = "RWKV-7 layer"
    recurrent = True
    token_shift = True
    kernel = "wkv"
    settings = (
        *("model.rwkv_decay_rank", "model.rwkv_iclr_rank", "model.rwkv_value_rank", "model.rwkv_gate_rank"),
        *("model.rwkv_init", "training.wkv_backend"),
    )

    def check(self, cfg: ModelConfig) -> None:
        if cfg.hidden_size % cfg.rwkv_head_size:
            raise UserError(
                f"--hidden-size {cfg.hidden_size} is not divisible by --rwkv-head-size {cfg.rwkv_head_size}; "
                f"use a multiple of {cfg.rwkv_head_size}"
            )

    def check_places(self, places: Sequence[int], flag: str) -> None:
        if places[0] != 0:
            raise UserError(
                f"{flag}: the first mixer must be R when there is any R (it makes the values the others use)"
            )

    def split_over_tp(self, config: Config, world_size: int) -> list[tuple[str, int]]:
        model = config.model
        heads, size = model.hidden_size // model.rwkv_head_size, model.rwkv_head_size
        sizes = f"--hidden-size {model.hidden_size} / --rwkv-head-size {size}"
        return [(f"the {heads} RWKV heads ({sizes})", heads)]

    def build(self, layer: Any) -> Any:
        from megaforge.nn.rwkv7 import RWKV7TimeMix

        return RWKV7TimeMix(layer)

    def flops(self, cfg: ModelConfig, sequence_length: int) -> float:
        """9 N^2 a head of size N: decay (1), removal (2 + 2), insertion (2) and reading (2) of its state in the
        recurrent form (Peng et al., arXiv 2503.14456); the chunked form does more, which does not count."""
        return 9.0 * cfg.hidden_size * cfg.rwkv_head_size

    def carried(self, cfg: ModelConfig, length: int, batch: int, tp: int) -> dict[str, tuple[int, ...]]:
        return {"v_first": (length, batch, cfg.hidden_size // tp)}

    def norms_embedding(self, cfg: ModelConfig) -> bool:
        """RWKV-LM's ln0."""
        return cfg.normalization == "layernorm"

    def ends_init(self, cfg: ModelConfig) -> tuple[Any, Any] | None:
        """RWKV-LM's own, for its own untied LayerNorm models."""
        if cfg.normalization != "layernorm" or not cfg.untie_embeddings_and_output_weights:
            return None
        from megaforge.nn.rwkv7 import published_ends

        return published_ends(cfg)


KIND = RWKV7()
