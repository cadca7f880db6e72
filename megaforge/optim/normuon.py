"""NorMuon (Li et al., arXiv 2510.05491): Muon whose rows, the neurons, move alike."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim.matrices import Stack
from megaforge.optim.muon import Muon
from megaforge.parallel.param_spec import ParamSpec

_SMALLEST = 1e-10


class NorMuon(Muon):
    """Muon with each row of the orthogonalized matrix divided by the root of its mean square over steps.

    ``v = beta2 v + (1 - beta2) mean(o^2)`` of each row of o; the update is ``o / sqrt(v)``, scaled to the norm that o
    has, so that --muon-scale-mode means the same. The mean square is of whole rows at every layout.
    """

    @classmethod
    def states(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return (*super().states(config), "row_square")

    @classmethod
    def state_spec(cls, config: OptimizerConfig, name: str, spec: ParamSpec) -> ParamSpec:
        if name != "row_square":
            return super().state_spec(config, name, spec)
        rows_split = spec.shard_dim is not None and spec.shard_dim < len(spec.shape) - 1
        return replace(
            spec,
            shape=spec.shape[:-1],
            shard_dim=spec.shard_dim if rows_split else None,
            parts=spec.parts if rows_split else (),
            role="vector",
            update="elementwise",
        )

    def adjusted(self, stack: Stack, update: Tensor) -> Tensor:
        kind, beta = stack.kind, self.config.normuon_beta2
        square = torch.linalg.vector_norm(update, dim=-1, dtype=torch.float64).square()
        self._sum(square, stack, kind.split == 1)
        mean = square / kind.columns
        factor, start = mean.clone(), 0
        for main, piece in stack.pieces:
            state = main.state["row_square"].view(main.parameter.shape[:-1])
            rows = state[tuple(slice(low, high) for low, high in piece.local_box[:-1])]
            own = slice(start, start := start + rows.numel() // rows.shape[-1])
            rows.lerp_(mean[own].view(rows.shape).to(rows.dtype), 1 - beta)
            factor[own] = rows.double().sqrt().clamp_min(_SMALLEST).reciprocal().view(factor[own].shape)
        norms = mean.new_empty((2, len(mean)))
        norms[0], norms[1] = square.sum(-1), (square * factor.square()).sum(-1)
        self._sum(norms, stack, kind.split == 0)
        kept = (norms[0] / norms[1].clamp_min(_SMALLEST**2)).sqrt()
        return update * (factor * kept[:, None]).unsqueeze(-1).to(update.dtype)

    def _sum(self, x: Tensor, stack: Stack, over_ranks: bool) -> None:
        if over_ranks:
            dist.all_reduce(x, group=self.ctx.axis(stack.kind.axis).group)
