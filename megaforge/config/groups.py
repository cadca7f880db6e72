"""Groups of parameters that flags may name, each with a factor: ``embedding=0.5``. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from megaforge.errors import UserError
from megaforge.registry import UPDATE_RULES

# What parameters are for; statistics are kept by kind.
KINDS = ("embedding", "head", "attention", "rwkv", "mamba", "moe", "router", "ffn", "mtp", "norm", "adapter", "other")
# Those of --decoupled-lr.
ENDS = ("embedding", "head")
# What is done with them, where training updates them.
ROLES = ("matrix", "lookup", "vector")


def group_factors(flag: str, given: Sequence[str]) -> dict[str, float]:
    """The factor of each group that ``flag`` names.

    Args:
        given: texts GROUP=FACTOR; a group is a kind, a role, or the name of an update rule.

    Raises:
        UserError: one is not of this form, names no group, or comes twice.
    """
    factors: dict[str, float] = {}
    for text in given:
        group, equals, number = text.partition("=")
        try:
            factor = float(number) if equals else -1.0
        except ValueError:
            factor = -1.0
        if not 0 <= factor < float("inf"):
            raise UserError(f"{flag} {text}: write GROUP=FACTOR with a factor of at least 0, such as embedding=0.5")
        groups = (*KINDS, *ROLES, *UPDATE_RULES.names())
        if group not in groups:
            raise UserError(f"{flag} {text}: there is no group {group}; there are {', '.join(groups)}")
        if group in factors:
            raise UserError(f"{flag} {text}: the group {group} has a factor already; give it once")
        factors[group] = factor
    return factors
