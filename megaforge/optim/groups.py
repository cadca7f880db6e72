"""Learning rate and weight decay of some parameters, as ``--lr-mult`` and ``--wd-mult`` say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from megaforge.config.groups import group_factors
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.errors import UserError
from megaforge.optim.update_rule import UpdateRule
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec
from megaforge.registry import UPDATE_RULES

RuleOf = Callable[[ParamSpec], type[UpdateRule]]


def _groups(spec: ParamSpec, rule: type[UpdateRule]) -> set[str]:
    """The groups that a parameter is in: its kind, its role, and every name of the rule that updates it."""
    return {spec.kind, spec.role, *(name for name in UPDATE_RULES.names() if UPDATE_RULES.get(name) is rule)}


def with_factors(config: OptimizerConfig, spec: ParamSpec, rule_of: RuleOf) -> ParamSpec:
    """``spec`` with what the flags multiply; a parameter of several groups has the product."""
    if not config.lr_mult and not config.wd_mult:
        return spec
    groups = _groups(spec, rule_of(spec))
    rate, decay = (
        math.prod(factor for group, factor in group_factors(flag, given).items() if group in groups)
        for flag, given in (("--lr-mult", config.lr_mult), ("--wd-mult", config.wd_mult))
    )
    return replace(spec, lr_mult=spec.lr_mult * rate, weight_decay=spec.weight_decay * decay)


def check_groups(config: OptimizerConfig, specs: Iterable[ParamSpec], rule_of: RuleOf, ctx: ParallelContext) -> None:
    """Refuses factors for what this model does not train. Collective.

    Args:
        specs: the trained parameters of this rank.

    Raises:
        UserError: on every rank.
    """
    if not config.lr_mult and not config.wd_mult:
        return
    own = set[str]().union(*(_groups(spec, rule_of(spec)) for spec in specs))
    there = set[str]().union(*exchange(ctx, own))
    for flag, given in (("--lr-mult", config.lr_mult), ("--wd-mult", config.wd_mult)):
        for group in group_factors(flag, given):
            if group not in there:
                raise UserError(
                    f"{flag} {' '.join(given)}: nothing that this run trains is of the group {group}; its groups are "
                    f"{', '.join(sorted(there))}"
                )
