"""The experts' arithmetic: a stack of two-matrix FFNs, each on its own rows, and the one that sees every token."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.kernels.grouped_mm import make_runs
from megaforge.nn.mlp import activate, inner_parts
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import InitRule
from megaforge.parallel.layers import ColumnParallelLinear, GroupedLinear, RowParallelLinear
from megaforge.parallel.param_spec import ParamSpec


class Experts(nn.Module):
    """This rank's experts: E/ep of them, their inner width split over etp.

    The matrices of ``up`` are [E, f, h] ([E, 2f, h] for swiglu), those of ``down`` [E, h, f].
    """

    def __init__(
        self,
        ctx: ParallelContext,
        name: str,
        cfg: ModelConfig,
        *,
        init: tuple[InitRule, InitRule],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.activation = cfg.activation
        number, hidden, parts = cfg.num_experts, cfg.hidden_size, inner_parts(cfg)
        stack = ParamSpec(
            f"{name}.up.weight",
            (number, sum(parts), hidden),
            init[0],
            shard_dim=1,
            shard_axis="etp",
            expert_dim=0,
            parts=parts,
            kind="moe",
        )
        down = dataclasses.replace(
            stack,
            name=f"{name}.down.weight",
            shape=(number, hidden, cfg.ffn_size),
            init=init[1],
            shard_dim=2,
            parts=(),
        )
        self.up = GroupedLinear(ctx, stack, dtype=dtype)
        self.down = GroupedLinear(ctx, down, dtype=dtype)

    def forward(self, rows: Tensor, weights: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Rows [R, h] sorted by expert and their routing weights [R] -> weighted partial sums over etp [R, h]."""
        runs = make_runs(counts, rows.device)
        inner = activate(self.activation, self.up(rows, runs))
        # The routing weight goes in front of the second projection: its gradient then needs no saved expert output.
        inner = inner * weights.to(inner.dtype).unsqueeze(1)
        return self.down(inner, runs)


class SharedExpert(nn.Module):
    """The FFN of ``--moe-shared-expert-intermediate-size`` that every token goes to, whatever its router says
    (DeepSeekMoE, arXiv 2401.06066); laid out over tp like a dense FFN."""

    def __init__(
        self,
        ctx: ParallelContext,
        name: str,
        cfg: ModelConfig,
        *,
        init: tuple[InitRule, InitRule],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.activation = cfg.activation
        shared = dataclasses.replace(cfg, ffn_hidden_size=cfg.moe_shared_expert_intermediate_size)
        parts = inner_parts(shared)
        self.up = ColumnParallelLinear(
            ctx, f"{name}.up", cfg.hidden_size, sum(parts), init=init[0], parts=parts, dtype=dtype, kind="ffn"
        )
        self.down = RowParallelLinear(
            ctx, f"{name}.down", shared.ffn_size, cfg.hidden_size, init=init[1], region=None, dtype=dtype, kind="ffn"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Every token [s, b, h], inside the region -> partial sums over tp [s, b, h]."""
        return self.down(activate(self.activation, self.up(x)))
