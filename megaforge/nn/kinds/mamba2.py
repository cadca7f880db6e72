"""``M``: Mamba-2."""

from __future__ import annotations

from typing import Any

from megaforge.config.config import Config
from megaforge.config.fields import divisors, either
from megaforge.config.layer_kind import LayerKind
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError


class Mamba2(LayerKind):
    """:class:`megaforge.nn.mamba2.Mamba2Mixer`."""

    title = "Mamba-2 layer"
    recurrent = True
    kernel = "wkv"
    in_megatron = True
    settings = (
        *(f"model.mamba_{name}" for name in ("state_dim", "head_dim", "num_groups", "num_heads")),
        "training.mamba_backend",
    )

    def check(self, cfg: ModelConfig) -> None:
        if cfg.mamba_num_heads is None and 2 * cfg.hidden_size % cfg.mamba_head_dim:
            raise UserError(
                f"--mamba-head-dim {cfg.mamba_head_dim} does not divide 2 x --hidden-size {cfg.hidden_size}; "
                f"use {either(divisors(2 * cfg.hidden_size))}, or give --mamba-num-heads"
            )
        if cfg.mamba_heads % cfg.mamba_num_groups:
            raise UserError(
                f"--mamba-num-groups {cfg.mamba_num_groups} does not divide the {cfg.mamba_heads} Mamba-2 heads; "
                f"use {either(divisors(cfg.mamba_heads))}"
            )

    def split_over_tp(self, config: Config, world_size: int) -> list[tuple[str, int]]:
        """The groups; each rank has whole ones, so heads divide too."""
        groups = config.model.mamba_num_groups
        return [(f"--mamba-num-groups {groups}", groups)]

    def describe(self, cfg: ModelConfig) -> str:
        return f"{cfg.mamba_heads} heads of {cfg.mamba_head_dim}, state {cfg.mamba_state_dim}"

    def build(self, layer: Any) -> Any:
        from megaforge.nn.mamba2 import Mamba2Mixer

        return Mamba2Mixer(layer)

    def flops(self, cfg: ModelConfig, sequence_length: int) -> float:
        """5 P N a head of P channels and N state channels: decay (1), insertion (2) and reading (2) of its state in the
        recurrent form (Dao and Gu, arXiv 2405.21060); the chunked form does more, which does not count. The convolution
        has 8 a channel."""
        inner = cfg.mamba_heads * cfg.mamba_head_dim
        convolved = inner + 2 * cfg.mamba_num_groups * cfg.mamba_state_dim
        return 5.0 * inner * cfg.mamba_state_dim + 8.0 * convolved


KIND = Mamba2()
