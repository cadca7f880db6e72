"""Mixture-of-experts FFN: softmax top-k router, dropless dispatch by sorting, experts' inner width split over tp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.nn.mlp import ChannelMix, FFNState, activate, ffn_init, inner_parts, mixed_input
from megaforge.nn.sequence import SequenceInfo
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.mappings import reduce_from_tensor_parallel, scale_gradient
from megaforge.parallel.param_spec import ParamSpec, make_parameter
from megaforge.parallel.region import TensorParallelRegion


@dataclass(frozen=True)
class RouterLosses:
    """What one MoE layer adds to the loss of a micro-batch, as sums, so that no layout enters.

    Attributes:
        load_balance_sum: over sequences, of E * sum_e f_e P_e, where f_e is the share of the sequence's assignments
            that go to expert e and P_e its mean router probability (Fedus et al., arXiv 2101.03961); 1 when balanced.
            Of sequences that the ranks of cp share, each rank has a part of the sum.
        z_loss_sum: over tokens, of the squared log-sum-exp of the router's logits (Zoph et al., arXiv 2202.08906).
        tokens_per_expert: int64 [E], assignments of this micro-batch.
    """

    load_balance_sum: Tensor
    z_loss_sum: Tensor
    tokens_per_expert: Tensor


class Router(nn.Module):
    """Top-k of a softmax, the chosen probabilities renormalised to one. Never in 16 bit."""

    def __init__(self, ctx: ParallelContext, name: str, cfg: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.topk = cfg.moe_router_topk
        self.share = 1 / ctx.tp.size
        self.context = ctx.cp
        # The experts' outputs are partial sums over tp, so the router's gradient is partial too.
        spec = ParamSpec(
            f"{name}.weight",
            (cfg.num_experts, cfg.hidden_size),
            Normal(cfg.init_std * cfg.init_std_scale),
            tp_partial_grad=True,
            keep_fp32=True,
            kind="router",
        )
        self.weight = make_parameter(spec, ctx, dtype)

    def forward(self, x_SBH: Tensor) -> tuple[Tensor, Tensor, RouterLosses]:
        """[s, b, h] inside the region -> weights [s*b, k], experts int64 [s*b, k] and the layer's losses."""
        length, batch, _ = x_SBH.shape
        logits = F.linear(x_SBH.to(self.weight.dtype), self.weight)
        chosen, experts = logits.topk(self.topk, dim=-1)
        weights = chosen.softmax(dim=-1)  # equal to renormalising the softmax over all experts
        # Every tp rank computes these losses in full from the same logits, and their gradients are summed over tp.
        shared = scale_gradient(logits, self.share)
        number = shared.shape[-1]
        counts = _count_per_sequence(experts, number)
        # The ranks of cp share each sequence. Its counts are those of all of them and carry no gradient; the loss is
        # linear in the probabilities, so each rank adds the share of its own tokens and their sum is the whole.
        whole = length * self.context.size
        assigned = reduce_from_tensor_parallel(counts, self.context)
        fraction = assigned.to(logits.dtype) / (self.topk * whole)
        probability = shared.softmax(dim=-1).sum(dim=0) / whole
        losses = RouterLosses(
            load_balance_sum=number * (fraction * probability).sum(),
            z_loss_sum=shared.logsumexp(dim=-1).square().sum(),
            tokens_per_expert=counts.sum(dim=0),
        )
        return weights.view(length * batch, -1), experts.view(length * batch, -1), losses


def _count_per_sequence(experts_SBK: Tensor, number: int) -> Tensor:
    """Assignments of each sequence to each expert: int64 [s, b, k] -> [b, E]."""
    batch = experts_SBK.shape[1]
    slot = experts_SBK + number * torch.arange(batch, device=experts_SBK.device)[:, None]
    return torch.bincount(slot.flatten(), minlength=batch * number).view(batch, number)


@dataclass(frozen=True)
class Plan:
    """Where each of the T*k assignments goes when they are sorted by expert; equal experts keep the order of tokens.

    Attributes:
        token: int64 [T*k], the token of each sorted assignment.
        position: int64 [T*k], the sorted place of assignment t*k + j.
        order: int64 [T*k], its inverse: the assignment at each sorted place.
        counts: assignments per expert.
        topk: assignments per token.
    """

    token: Tensor
    position: Tensor
    order: Tensor
    counts: tuple[int, ...]
    topk: int


def make_plan(experts: Tensor, tokens_per_expert: Tensor) -> Plan:
    """The dispatch of ``experts`` int64 [T, k]."""
    order = experts.flatten().argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    return Plan(order // experts.shape[1], position, order, tuple(tokens_per_expert.tolist()), experts.shape[1])


class _Dispatch(torch.autograd.Function):
    """Forward: a copy of each token for each of its experts, sorted by expert. Backward: the sum of a token's copies,
    by gathering, so that it needs no atomic addition and is the same every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_copies(grad, ctx.plan), None


class _Combine(torch.autograd.Function):
    """Forward: the sum of each token's sorted copies. Backward: a copy of the gradient for each. Dual of _Dispatch."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _sum_copies(y, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.token), None


def _sum_copies(y: Tensor, plan: Plan) -> Tensor:
    return y.index_select(0, plan.position).view(-1, plan.topk, y.shape[-1]).sum(dim=1)


class _GroupedLinear(torch.autograd.Function):
    """``y_n = x_n W_e^T`` for rows sorted by expert, ``counts[e]`` rows for expert e. The gradient of W is written
    expert by expert into one tensor; an expert without rows gets zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[1])
        for matrix, rows, result in zip(weight, x.split(counts), out.split(counts), strict=True):
            torch.mm(rows, matrix.t(), out=result)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        pieces = zip(
            weight, grad_weight, x.split(ctx.counts), grad.split(ctx.counts), grad_x.split(ctx.counts), strict=True
        )
        for matrix, grad_matrix, rows, grad_rows, out in pieces:
            torch.mm(grad_rows, matrix, out=out)
            torch.mm(grad_rows.t(), rows, out=grad_matrix)
        return grad_x, grad_weight, None


def grouped_linear(x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Each expert's own linear map on its own rows.

    Args:
        x: [N, in], rows sorted by expert.
        weight: [E, out, in].
        counts: rows of each expert; they add up to N.

    Returns:
        [N, out].
    """
    return _GroupedLinear.apply(x, weight, counts)


class MoEFFN(nn.Module):
    """A router and E two-matrix experts, stacked: ``up`` [E, f, h] ([E, 2f, h] for swiglu), ``down`` [E, h, f]."""

    def __init__(
        self,
        ctx: ParallelContext,
        name: str,
        cfg: ModelConfig,
        *,
        layer_index: int,
        num_layers: int,
        channel_mix: bool,
        region: TensorParallelRegion,
        dtype: torch.dtype,
    ) -> None:
        """Raises:
        UserError: the experts' inner width does not divide by tp.
        """
        super().__init__()
        if cfg.ffn_size % ctx.etp.size:
            raise UserError(f"--ffn-hidden-size {cfg.ffn_size} does not divide by --tp {ctx.etp.size}")
        self.region = region
        self.activation = cfg.activation
        mix = {"layer_index": layer_index, "num_layers": num_layers, "dtype": dtype}
        self.mix = ChannelMix(ctx, name, cfg, **mix) if channel_mix else None  # type: ignore[arg-type]
        self.router = Router(ctx, f"{name}.router", cfg, dtype=dtype)
        first, second = ffn_init(cfg, num_layers, channel_mix)
        experts, hidden, parts = cfg.num_experts, cfg.hidden_size, inner_parts(cfg)
        up = ParamSpec(
            f"{name}.up.weight",
            (experts, sum(parts), hidden),
            first,
            shard_dim=1,
            shard_axis="etp",
            expert_dim=0,
            parts=parts,
            kind="moe",
        )
        down = ParamSpec(
            f"{name}.down.weight",
            (experts, hidden, cfg.ffn_size),
            second,
            shard_dim=2,
            shard_axis="etp",
            expert_dim=0,
            kind="moe",
        )
        self.up = make_parameter(up, ctx, dtype)
        self.down = make_parameter(down, ctx, dtype)

    def forward(self, x: Tensor, info: SequenceInfo, state: FFNState | None = None) -> tuple[Tensor, RouterLosses]:
        """Normed residual stream [s(/tp), b, h] -> residual stream [s(/tp), b, h], and the layer's losses."""
        x = mixed_input(self.mix, self.region.enter(x), info, state)
        weights, experts, losses = self.router(x)
        plan = make_plan(experts, losses.tokens_per_expert)
        tokens = x.flatten(0, 1)
        inner = activate(self.activation, grouped_linear(_Dispatch.apply(tokens, plan), self.up, plan.counts))
        # The routing weight goes in front of the second projection: its gradient then needs no saved expert output.
        inner = inner * weights.flatten()[plan.order].to(inner.dtype).unsqueeze(1)
        out = _Combine.apply(grouped_linear(inner, self.down, plan.counts), plan)
        return self.region.exit(out.view_as(x)), losses
