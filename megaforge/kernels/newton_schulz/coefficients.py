"""The polynomials of Newton-Schulz iterations: X <- a X + (b A + c A A) X with A = X X^T, a triple a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle, islice, repeat

from megaforge.errors import UserError

Triple = tuple[float, float, float]

# As NVIDIA's Emerging-Optimizers rounds them (github.com/NVIDIA-NeMo/Emerging-Optimizers).
_TYPES: dict[str, tuple[Triple, ...]] = {
    # Jordan et al. (github.com/KellerJordan/Muon): one triple, repeated.
    "simple": ((3.4445, -4.7750, 2.0315),),
    # You Jiacheng's five (x.com/YouJiacheng/status/1905861218138804534), repeated in turn.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al. (arXiv 2505.16932); the last is repeated.
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
    # Grishina et al. (arXiv 2506.10935); the last is repeated.
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
}
COEFFICIENT_TYPES = (*_TYPES, "custom")
# Cut off earlier they leave singular values between 0.4 and 1.6: the first triples are made to be followed by the rest.
_FEWEST = {"polar_express": 5, "cans": 5}


def coefficients(coefficient_type: str, steps: int, custom: Sequence[Triple] | None = None) -> tuple[Triple, ...]:
    """The triples (a, b, c) of ``steps`` steps.

    Args:
        coefficient_type: one of :data:`COEFFICIENT_TYPES`.
        custom: the triples of ``custom``, repeated in turn.

    Raises:
        UserError: no such type; fewer steps than it is made for; ``custom`` without triples, or triples without it.
    """
    if coefficient_type not in COEFFICIENT_TYPES:
        raise UserError(
            f"{coefficient_type!r} is not a type of coefficients; use one of {', '.join(COEFFICIENT_TYPES)}"
        )
    if (coefficient_type == "custom") != (custom is not None):
        raise UserError(
            f"coefficients of type {coefficient_type!r}: triples go with the type 'custom', and only with it"
        )
    least = _FEWEST.get(coefficient_type, 1)
    if steps < least:
        raise UserError(f"{steps} steps of {coefficient_type} coefficients; use at least {least}")
    triples = _TYPES[coefficient_type] if custom is None else tuple(custom)
    if not triples or any(len(triple) != 3 for triple in triples):
        raise UserError(f"custom coefficients {list(triples)}: give at least one triple a, b, c")
    endless = chain(triples, repeat(triples[-1])) if coefficient_type in _FEWEST else cycle(triples)
    return tuple((float(a), float(b), float(c)) for a, b, c in islice(endless, steps))
