"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) over fp32 master weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megaforge.config.run_config import OptimizerConfig
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import FlatShard, optimizer_shard
from megaforge.parallel.param_spec import ParamSpec, named_specs
from megaforge.parallel.zero import ShardedParameters

Entry = tuple[str, ParamSpec | FlatShard, Tensor]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """The optimizer of a model's local parameters.

    Weight decay and the learning-rate factor of each parameter are those its :class:`ParamSpec` declares. A parameter
    in a 16-bit type has an fp32 master here, which is what is updated, stored in checkpoints, and rounded into the
    model; wider parameters are their own masters. Gradients are read from ``parameter.main_grad``.

    With ``shards`` (ZeRO) all of this is about the share of each parameter that this rank holds; after an update the
    shares are gathered while the caller goes on (:meth:`wait_for_parameters`).

    Attributes:
        implementation: which code computes the update, for the log.
        shards: how parameters are shared out, or None.
    """

    def __init__(
        self, config: OptimizerConfig, model: nn.Module, ctx: ParallelContext, shards: ShardedParameters | None = None
    ) -> None:
        self.shards = shards
        self._parameters = list(named_specs(model))
        self._trained = [(spec, parameter) for spec, parameter in self._parameters if parameter.requires_grad]
        self._masters = {spec.name: self._master_of(parameter) for spec, parameter in self._trained}
        groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
        for spec, _ in self._trained:
            master = self._masters[spec.name]
            # Of a parameter that other replicas hold there is nothing to update. Apex must not even see it: its loop
            # launches what it has gathered at the end of the list's last tensor, which an empty one never reaches.
            if master.numel():
                groups[spec.weight_decay, spec.lr_mult].append(master)
        param_groups = [
            {"params": masters, "weight_decay": config.weight_decay if decays else 0.0, "lr_mult": lr_mult}
            for (decays, lr_mult), masters in groups.items()
        ] or [{"params": [], "lr_mult": 1.0}]
        arguments: dict[str, Any] = {
            "lr": config.lr,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_eps,
        }
        wide = any(parameter.dtype == torch.float64 for _, parameter in self._trained)
        fused_adam = _nvidia_fused_adam() if _uses_cuda(ctx) and not wide and groups else None
        self._optimizer: torch.optim.Optimizer
        if fused_adam is not None:
            self.implementation = "NVIDIA apex FusedAdam"
            self._optimizer = fused_adam(param_groups, adam_w_mode=True, **arguments)
        else:
            self.implementation = "torch fused AdamW"
            self._optimizer = torch.optim.AdamW(param_groups, fused=True, **arguments)
        self._steps = 0
        self._write_steps()

    def _master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What is updated in place of ``parameter``: an fp32 copy of a 16-bit one; itself, or its share of memory."""
        held = parameter if self.shards is None else self.shards.own(parameter)
        if held.dtype in (torch.bfloat16, torch.float16):
            return nn.Parameter(held.detach().float())
        return parameter if self.shards is None else nn.Parameter(held)

    def _moments_of(self, spec: ParamSpec) -> dict[str, Tensor]:
        """The state of one parameter. Zero moments are made when first asked for: a checkpoint can be loaded into them
        before the first step, and who only loads weights pays no memory for them."""
        master = self._masters[spec.name]
        state = self._optimizer.state[master]
        if not state:
            state.update({moment: torch.zeros_like(master) for moment in _MOMENTS}, step=self._step_tensor(master))
        return state

    def _step_tensor(self, master: Tensor) -> Tensor:
        return torch.tensor(float(self._steps), dtype=torch.float32, device=master.device)

    def _write_steps(self) -> None:
        """Tells the implementation how many steps have been made: torch keeps that per parameter, apex per group."""
        for group in self._optimizer.param_groups:
            group["step"] = self._steps
        for master, state in self._optimizer.state.items():
            if state:
                state["step"] = self._step_tensor(master)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from every ``main_grad``, at the learning rate ``lr`` times each parameter's own factor."""
        self.wait_for_parameters()  # a part of the model that no forward pass has used may still be on its way
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        for spec, parameter in self._trained:
            self._masters[spec.name].grad = parameter.main_grad  # type: ignore[attr-defined]
            self._moments_of(spec)
        self._optimizer.step()
        self._steps += 1
        self._write_into_model()

    @torch.no_grad()
    def _write_into_model(self) -> None:
        """Rounds masters into the model, and spreads the shares."""
        for spec, parameter in self._trained:
            master = self._masters[spec.name]
            if master.dtype != parameter.dtype:
                held = parameter if self.shards is None else self.shards.own(parameter)
                held.copy_(master)
        if self.shards is not None:
            self.shards.gather()

    def wait_for_parameters(self) -> None:
        """Returns once every parameter of the model is up to date. Modules wait for their own before their forward;
        call this before reading parameters in another way."""
        if self.shards is not None:
            self.shards.wait()

    def weight_entries(self) -> list[Entry]:
        """(global name, declaration, local master) of every parameter; a frozen one is its own master."""
        return [
            (spec.name, optimizer_shard(parameter), self._masters.get(spec.name, parameter).detach())
            for spec, parameter in self._parameters
        ]

    def moment_entries(self) -> list[Entry]:
        """(``optimizer.exp_avg.NAME`` or ``optimizer.exp_avg_sq.NAME``, the parameter's declaration, local moment)."""
        return [
            (f"optimizer.{moment}.{spec.name}", optimizer_shard(parameter), self._moments_of(spec)[moment])
            for spec, parameter in self._trained
            for moment in _MOMENTS
        ]

    def entries(self) -> list[Entry]:
        """Weights and moments. Loading a checkpoint writes into them in place and then calls :meth:`after_load`."""
        return self.weight_entries() + self.moment_entries()

    def state(self) -> dict[str, int]:
        """What belongs in a checkpoint besides tensors; JSON-able."""
        return {"step": self._steps}

    def load_state(self, state: dict[str, int]) -> None:
        """Takes back what :meth:`state` gave."""
        self._steps = int(state["step"])
        self._write_steps()

    def after_load(self) -> None:
        """Brings freshly loaded masters into the model."""
        self._write_into_model()


def _uses_cuda(ctx: ParallelContext) -> bool:
    return ctx.device.type == "cuda"


def _nvidia_fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedAdam (github.com/NVIDIA/apex) when it is installed with its CUDA extension.

    The package called apex on PyPI is another product: it has no ``apex.optimizers`` and brings no ``amp_C``.
    """
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("amp_C") is None:
        return None
    try:
        return getattr(importlib.import_module("apex.optimizers"), "FusedAdam", None)
    except ImportError:
        return None
