"""How parameters are updated: the form that every rule has, and rules that an optimizer of torch's kind computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim.main_parameters import MainParameter
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec


class UpdateRule(ABC):
    """The update of some parameters, of a bucket under ZeRO; registered by name for ``--optimizer``.

    Attributes:
        implementation: which code computes it, for the log.
        whole_parameters: whether it must see all of this rank's part of a parameter (:meth:`MainParameter.in_shape`).
            ZeRO then gives each to one of its replicas, balanced by :meth:`cost`, in place of cutting buckets anywhere.
        host_state: whether its states lie in host memory (pinned, beside a GPU) rather than where parameters do.
        others: the rule of the parameters that this one does not take.
        decay_factor: what the run multiplies weight decay by at present.
        decoupled: whether its parameters are those of ``--decoupled-lr``.
    """

    implementation: str = "torch"
    whole_parameters: ClassVar[bool] = False
    host_state: ClassVar[bool] = False
    others: ClassVar[str] = "adam"
    decay_factor: float = 1.0
    decoupled: bool = False

    def __init__(self, config: OptimizerConfig, parameters: Sequence[MainParameter], ctx: ParallelContext) -> None:
        """
        Args:
            parameters: those that this rank holds something of; their ``state`` has what :meth:`states` names.
            ctx: the other ranks. All that hold shards of the same parameters (tp, etp) make the same rules of them and
                step in the same order, so that a rule may communicate over these axes.
        """
        self.config, self.parameters, self.ctx = config, parameters, ctx

    @property
    def decay(self) -> float:
        """Weight decay at present; a parameter's own is ``spec.weight_decay``, a factor, times it."""
        return self.config.weight_decay * self.decay_factor

    @classmethod
    def takes(cls, spec: ParamSpec) -> bool:
        """Whether the rule updates a parameter; ``spec.update`` says which whole-matrix rules may."""
        return True

    @classmethod
    def states(cls, config: OptimizerConfig) -> tuple[str, ...]:
        """Names of the tensors kept of each parameter: they are saved, resharded and planned for."""
        return ()

    @classmethod
    def state_spec(cls, config: OptimizerConfig, name: str, spec: ParamSpec) -> ParamSpec:
        """The declaration of the state ``name`` of a parameter: its shape, and how that is split; by default the
        parameter's own. One of another shape needs :attr:`whole_parameters`."""
        return spec

    @classmethod
    def cost(cls, config: OptimizerConfig, spec: ParamSpec, ctx: ParallelContext) -> float:
        """What a rank does to update its shard of a parameter, in any unit; the same number on all that hold one."""
        return spec.numel / spec.shards(ctx)

    @classmethod
    def products(cls, config: OptimizerConfig, spec: ParamSpec, ctx: ParallelContext) -> float:
        """Multiply-adds in matrix products of a rank that updates its shard of a parameter, on average over those that
        share the work; for the planner. What is done element by element has none."""
        return 0.0

    @abstractmethod
    def step(self, lr: float, done: int) -> None:
        """Updates every ``master`` from its ``grad``, without gradient tracking.

        Args:
            lr: the learning rate; a parameter's own is ``spec.lr_mult`` times it.
            done: steps made before this one.
        """


class TorchRule(UpdateRule):
    """A rule that a :class:`torch.optim.Optimizer` computes, on our masters, gradients and state."""

    def __init__(self, config: OptimizerConfig, parameters: Sequence[MainParameter], ctx: ParallelContext) -> None:
        super().__init__(config, parameters, ctx)
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for main in parameters:
            groups[main.spec.weight_decay, main.spec.lr_mult].append(main.master)
        self._optimizer = self.make(
            [
                {
                    "params": masters,
                    "weight_decay": config.weight_decay * decays,
                    "decays": decays,
                    "lr_mult": lr_mult,
                }
                for (decays, lr_mult), masters in groups.items()
            ]
        )
        self._done = -1

    @abstractmethod
    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer for parameter groups, at least one. Before each step they get their ``lr`` and
        ``weight_decay``."""

    def step(self, lr: float, done: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.decay * group["decays"]
        for main in self.parameters:
            main.master.grad = main.grad
        if done != self._done:
            self._take_up(done)
        self._optimizer.step()
        self._done = done + 1

    def _take_up(self, done: int) -> None:
        """Gives the optimizer our state, and the number of steps: torch keeps that per parameter, apex per group."""
        for group in self._optimizer.param_groups:
            group["step"] = done
        for main in self.parameters:
            steps: Tensor = torch.tensor(float(done), dtype=torch.float32, device=main.master.device)
            self._optimizer.state[main.master] = {**main.state, "step": steps}
