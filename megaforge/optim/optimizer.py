"""The optimizer step of a model's local part: which rule updates what, and when the result travels.

A step has three phases a bucket, and the buckets follow each other in the order in which the next forward pass will
need them:

1. *update*: the rule of the bucket reads the reduced gradients (``main_grad``) and updates the fp32 masters;
2. *write back*: 16-bit parameters get their masters, rounded; a wide parameter is its own master, so nothing moves;
3. *gather* (ZeRO): each rank has updated its own slice only, so the slices start to travel to the other replicas.

The gather of a bucket is on its way while the next bucket is updated, and the last ones while the next forward pass has
begun: each module waits for its own parameters right before it computes with them
(:class:`megaforge.parallel.zero.ShardedParameters`). Without ZeRO all parameters of a rule are one bucket, and phase 3
is empty. The order is the same on every rank, so collectives match; it changes no number, because no parameter's update
reads another's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from megaforge.config.groups import ENDS
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.device import synchronize, zeros_in_host_memory
from megaforge.optim.groups import with_factors
from megaforge.optim.main_parameters import MainParameter, MainParameters
from megaforge.optim.update_rule import UpdateRule
from megaforge.parallel.buckets import Bucket, BucketPolicy
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import Entry, FlatShard, optimizer_shard
from megaforge.parallel.param_spec import ParamSpec
from megaforge.parallel.zero import ShardedParameters
from megaforge.registry import UPDATE_RULES


def rule_of(config: OptimizerConfig, spec: ParamSpec) -> type[UpdateRule]:
    """The rule that updates a parameter: ``--optimizer``, or what that one leaves the parameter to."""
    chosen: type[UpdateRule] = UPDATE_RULES.get(config.optimizer)
    return chosen if chosen.takes(spec) else UPDATE_RULES.get(chosen.others)


def bucket_policy(config: OptimizerConfig) -> Callable[[ParamSpec], BucketPolicy]:
    """How ZeRO lays a parameter out: only with those of its rule, and whole where the rule asks for it."""

    @cache
    def of_rule(rule: type[UpdateRule]) -> BucketPolicy:
        return BucketPolicy(rule.__qualname__, partial(rule.cost, config) if rule.whole_parameters else None)

    return lambda spec: of_rule(rule_of(config, spec))


class Optimizer:
    """Updates a model's local parameters by their rules.

    Weight decay and the learning-rate factor of each parameter are those its :class:`ParamSpec` declares, times
    ``--lr-mult`` and ``--wd-mult``. With
    ``shards`` (ZeRO) all of this is about the range of each parameter that this rank holds.

    Attributes:
        main: the masters.
        ctx: this rank among the others.
        shards: how parameters are sharded, or None.
        decay_factor: on the weight decay of every parameter.
        decoupled_lr: the next step's learning rate of embedding and head, where they have their own.
        correct: is called with each parameter that its rule has updated, before its master is rounded and travels.
    """

    decay_factor = 1.0
    decoupled_lr: float | None = None
    correct: Callable[[MainParameter], None] | None = None

    def __init__(
        self,
        config: OptimizerConfig,
        model: nn.Module,
        ctx: ParallelContext,
        shards: ShardedParameters | None = None,
    ) -> None:
        self.config, self.ctx, self.shards = config, ctx, shards
        self.main = MainParameters(model, shards)
        for main in self.main.trained:
            main.spec = with_factors(config, main.spec, partial(rule_of, config))
        self._states = {main.spec.name: rule_of(config, main.spec).states(config) for main in self.main.trained}
        self._phases: list[tuple[list[UpdateRule], Bucket | None]] = []
        for bucket, parameters in self._by_bucket():
            by_rule: dict[tuple[type[UpdateRule], bool], list[MainParameter]] = defaultdict(list)
            for main in parameters:
                # Of a parameter that other replicas hold there is nothing to update. Apex must not even see it: its
                # loop launches what it has gathered at the end of the list's last tensor, which an empty one never
                # reaches.
                if main.master.numel():
                    rule = rule_of(config, main.spec)
                    if rule.whole_parameters and main.master.numel() != main.parameter.numel():
                        raise ValueError(
                            f"{main.spec.name} is cut: shard by bucket_policy for --optimizer {config.optimizer}"
                        )
                    by_rule[rule, config.decoupled_lr is not None and main.spec.kind in ENDS].append(main)
            rules = [rule(config, tuple(some), self.ctx) for (rule, _), some in by_rule.items()]
            for made, (_, decoupled) in zip(rules, by_rule, strict=True):
                made.decoupled = decoupled
            self._phases.append((rules, bucket))
        self._steps = 0

    def _by_bucket(self) -> list[tuple[Bucket | None, list[MainParameter]]]:
        """The trained parameters in the order in which the forward pass uses their buckets."""
        if self.shards is None:
            return [(None, self.main.trained)]
        known = {id(main.parameter): main for main in self.main.trained}
        return [
            (bucket, [known[id(parameter)] for parameter in bucket.parameters])
            for bucket in self.shards.in_forward_order()
        ]

    @property
    def implementation(self) -> str:
        """Which code computes the updates."""
        names = dict.fromkeys(rule.implementation for rules, _ in self._phases for rule in rules)
        return ", ".join(names) or "nothing to update"

    def _make_state(self) -> None:
        """Zero state is made when first asked for: a checkpoint can be loaded into it before the first step, and who
        only loads weights pays no memory for it."""
        for main in self.main.trained:
            for name in self._states[main.spec.name]:
                if name not in main.state:
                    zeros = self._zeros(main, self._declared(main, name))
                    main.state[name] = zeros.requires_grad_(False)

    def _zeros(self, main: MainParameter, declared: ParamSpec | FlatShard) -> torch.Tensor:
        master = main.master
        if declared is not optimizer_shard(main.parameter):
            return torch.zeros(declared.local_shape(self.ctx), dtype=master.dtype, device=master.device)
        return zeros_in_host_memory(master) if self._on_host(main) else torch.zeros_like(master)

    def _declared(self, main: MainParameter, name: str) -> ParamSpec | FlatShard:
        """What this rank holds of the state ``name`` of a parameter."""
        held = optimizer_shard(main.parameter)
        spec = rule_of(self.config, main.spec).state_spec(self.config, name, main.spec)
        if spec is main.spec:
            return held
        if not isinstance(held, FlatShard):
            return spec
        # Under ZeRO the one replica that holds the parameter, whole, has its state, and the others nothing.
        return FlatShard(spec, 0, math.prod(spec.local_shape(self.ctx)) if held.start < held.stop else 0)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from every ``main_grad``, at the learning rate ``lr`` (embedding and head: :attr:`decoupled_lr`,
        where it is set) times each parameter's own factor."""
        self.wait_for_parameters()  # a part of the model that no forward pass has used may still be on its way
        self._make_state()
        correct = self.correct
        for rules, bucket in self._phases:
            for rule in rules:
                rule.decay_factor = self.decay_factor
                rule.step(self.decoupled_lr if rule.decoupled and self.decoupled_lr is not None else lr, self._steps)
                if correct is not None:
                    for main in rule.parameters:
                        correct(main)
                self.main.write_back(rule.parameters)
            if self.shards is not None and bucket is not None:
                self.shards.all_gather_parameters(bucket)
        self._steps += 1

    def wait_for_parameters(self) -> None:
        """Returns once every parameter of the model is up to date. Modules wait for their own before their forward;
        call this before reading parameters in another way."""
        if self.shards is not None:
            self.shards.wait_for_parameters()

    def weight_entries(self) -> list[Entry]:
        """:meth:`MainParameters.entries`."""
        return self.main.entries()

    def state_entries(self) -> list[Entry]:
        """(``optimizer.STATE.NAME``, declaration, local tensor) of what the rules keep. What lies in
        host memory has arrived there."""
        self._make_state()
        for device in {main.master.device for main in self.main.trained if self._on_host(main)}:
            synchronize(device)
        return [
            (f"optimizer.{name}.{main.spec.name}", self._declared(main, name), tensor)
            for main in self.main.trained
            for name, tensor in main.state.items()
        ]

    @property
    def host_bytes(self) -> int:
        """Bytes of state in host memory."""
        self._make_state()
        return sum(t.nbytes for main in self.main.trained if self._on_host(main) for t in main.state.values())

    def _on_host(self, main: MainParameter) -> bool:
        return rule_of(self.config, main.spec).host_state

    def entries(self) -> list[Entry]:
        """Weights and state. Loading a checkpoint writes into them in place and then calls :meth:`after_load`."""
        return self.weight_entries() + self.state_entries()

    def state(self) -> dict[str, Any]:
        """What belongs in a checkpoint besides tensors; JSON-able."""
        return {"step": self._steps, "states": sorted(set(chain.from_iterable(self._states.values())))}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state` gave."""
        self._steps = int(state["step"])

    def after_load(self) -> None:
        """Brings freshly loaded masters into the model."""
        self.main.after_load()
