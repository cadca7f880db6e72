"""What a loss is made of: named terms, each a sum over this rank's tokens and what its mean is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaforge.errors import UserError


@dataclass(frozen=True)
class LossTerm:
    """A term of the loss as one micro-batch has it on one rank. Its value is the sum over micro-batches, stages, dp and
    cp, divided by a count of the global batch, so that no layout enters.

    Attributes:
        sum: a scalar; the same on every rank of tp.
        denominator: which count: ``labels`` that count, ``tokens``, ``sequences``, or one that the objective counts.
        weight: of the term's value in what is trained; 0: it is only reported.
        layers: of the whole model that make such a term: what is trained is their sum, what is reported their mean.
    """

    sum: Tensor
    denominator: str
    weight: float = 1.0
    layers: int = 1


def add_terms(known: dict[str, LossTerm], more: Mapping[str, LossTerm]) -> None:
    """Adds terms to those of the same name."""
    for name, term in more.items():
        known[name] = replace(term, sum=known[name].sum + term.sum) if name in known else term


def count_of(name: str, denominator: str, counts: Mapping[str, Tensor | float]) -> Tensor | float:
    """What the term called ``name`` is divided by.

    Raises:
        UserError: nobody counts that.
    """
    if denominator not in counts:
        known = ", ".join(sorted(counts)) or "none"
        raise UserError(
            f"the loss term {name!r} is divided by {denominator!r}, which is not counted; counts are {known}"
        )
    return counts[denominator]


def total_loss(terms: Mapping[str, LossTerm], counts: Mapping[str, Tensor | float]) -> Tensor | None:
    """What ``terms`` add to the loss that is differentiated, by the global batch's ``counts``; None where nothing. At
    least of fp32: a sum over a long batch loses its digits in 16 bits.

    Raises:
        UserError: a term is divided by what is not counted.
    """
    total: Tensor | None = None
    for name, term in terms.items():
        if term.weight:
            count = count_of(name, term.denominator, counts)
            wide = term.sum.to(torch.promote_types(term.sum.dtype, torch.float32))
            # A count of fp64 would make the loss one too.
            count = count.to(wide.dtype) if isinstance(count, Tensor) else count
            value = (wide if term.weight == 1.0 else term.weight * wide) / count
            total = value if total is None else total + value
    return total
