"""What an agent adds to a model, where its last stage is: ``agent.policy``, ``agent.value`` and ``agent.summariser``.

All of it is whole on every rank; of tp's ranks each computes all decisions, and has the whole gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.models.stages import ModelChunks
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.layers import ReplicatedLinear
from megaforge.parallel.param_spec import ParamSpec, make_parameter, spec_of
from megaforge.peft.freeze import freeze_all
from megaforge.reasoning.agent.episode import FLAGS
from megaforge.reasoning.memory.summariser import Summariser
from megaforge.registry import AGENT_ACTIONS


class Opinion(NamedTuple):
    """What the heads say of decisions: log-probabilities of all actions [..., A] (-inf: not possible), the reference's,
    and the value [...]."""

    log_probs: Tensor
    reference: Tensor
    value: Tensor


class AgentHeads(nn.Module):
    """Linear maps of the normed residual stream, to which what was read of working memory is added, and of the flags of
    an episode. They begin at zero: every possible action is as likely.

    The reference is the policy as it was when the run began, of the stream of the model without adapters.
    """

    def __init__(
        self, cfg: ModelConfig, ctx: ParallelContext, dtype: torch.dtype, place: torch.device | None = None
    ) -> None:
        """``place``: where parameters lie, if not on the device of ``ctx``."""
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        actions, inner = len(AGENT_ACTIONS.names()), cfg.hidden_size + len(FLAGS)
        self.hidden_size = cfg.hidden_size

        def zeros(*shape: int, role: str = "matrix") -> nn.Parameter:
            decays = {} if len(shape) > 1 else {"weight_decay": False}
            spec = ParamSpec("", shape, Constant(0.0), role=role, update="elementwise", **decays)  # type: ignore[arg-type]
            return make_parameter(spec, ctx, wide, place)

        self.policy = ReplicatedLinear(zeros(actions, inner), zeros(actions, role="vector"))
        self.value = ReplicatedLinear(zeros(1, inner), zeros(1, role="vector"))
        self.summariser = Summariser(
            cfg.hidden_size, cfg.memory_dim, ctx, stride=cfg.memory_stride, dtype=wide, place=place
        )
        self.reference = zeros(actions, inner, role="state")
        self.reference_bias = zeros(actions, role="state")
        self.reference_memory = zeros(actions, cfg.memory_dim, role="state")
        for parameter in self.parameters():
            parameter.spec = replace(spec_of(parameter), kind="adapter")  # type: ignore[attr-defined]
        possible = [[True] * actions, [AGENT_ACTIONS.get(name).answering for name in AGENT_ACTIONS.names()]]
        self.possible = torch.tensor(possible)

    def opinion(self, hidden: Tensor, flags: Tensor, memory: Tensor, plain: Tensor | None = None) -> Opinion:
        """
        Args:
            hidden: [..., d].
            flags: [..., F], of episodes (:data:`megaforge.reasoning.agent.episode.FLAGS`).
            memory: [..., S], what was read of working memory.
            plain: ``hidden`` of the model without adapters; None: the same.
        """
        dtype = self.policy.weight.dtype
        flags, memory = flags.to(dtype), memory.to(dtype)
        inner = torch.cat([hidden.to(dtype) + self.summariser.up(memory), flags], -1)
        possible = self.possible.to(flags.device)[flags[..., 0].long()]
        seen = torch.cat([(hidden if plain is None else plain).detach().to(dtype), flags], -1)
        reference = seen @ self.reference.t() + memory @ self.reference_memory.t() + self.reference_bias
        policy, reference = (
            x.masked_fill(~possible, -torch.inf).log_softmax(-1) for x in (self.policy(inner), reference)
        )
        return Opinion(policy, reference, self.value(inner).squeeze(-1))

    @torch.no_grad()
    def keep_reference(self) -> None:
        """The policy as it is now becomes the reference."""
        self.reference.copy_(self.policy.weight)
        assert self.policy.bias is not None
        self.reference_bias.copy_(self.policy.bias)
        self.reference_memory.copy_(self.policy.weight[:, : self.hidden_size] @ self.summariser.up.weight)


def agent_heads(model: nn.Module, ctx: ParallelContext) -> None:
    """The converter of ``--agent-heads``: heads beside the output head. Without ``--peft`` all else is frozen."""
    cfg = cast(ModelConfig, model.cfg)
    if cfg.peft is None:
        freeze_all(model)
    if not getattr(model, "is_last", True):
        return
    weight = next(model.parameters())
    place = weight.device if weight.is_meta else None
    heads = AgentHeads(cfg, ctx, cast(torch.dtype, model.dtype), place)
    for name in ("reference", "reference_bias", "reference_memory"):
        getattr(heads, name).requires_grad_(False)
    model.add_module("agent", heads)


def heads_of(model: HybridModel | ModelChunks) -> AgentHeads | None:
    """Those of this rank's stages, where one of them is the last.

    Raises:
        UserError: the model has none.
    """
    last = model.chunks[-1]
    if not model.cfg.agent_heads:
        raise UserError("--objective agent: the model has no heads that decide: add --agent-heads")
    return cast(AgentHeads, last.agent) if last.is_last else None
