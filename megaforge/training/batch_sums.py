"""The numbers of a global batch: summed on the device, over ranks, and read by the host once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.config.expert_layers import ExpertLayers
from megaforge.device import upload
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.nn.losses import LossTerm, count_of
from megaforge.parallel.agree import describe_failures, exchange
from megaforge.parallel.context import ParallelContext
from megaforge.training.expert_balance import balance_numbers
from megaforge.training.objectives import Objective


class BatchSums:
    """Sums over micro-batches and this rank's stages, then over dp, cp and pp; fp64, so that their order hardly
    matters. Every rank ends with the numbers of the whole model.

    Attributes:
        objective: what made the terms.
        counts: what means are taken over, of the global batch: on the device, or known to the host.
        found: the terms that this rank has added, and the name of the count that each is divided by.
        experts: after :meth:`reduce`, float64 [3, MoE layers, E]: tokens that each expert was chosen for, its choices
            by plain top-k, and of the former those within its capacity; on the device. Layers of fewer experts have
            zeros at the end.
        layers: those that have experts.
        each_layer: whether numbers of each of them are wanted, besides those of all (``--moe-per-layer-logging``).
        votes: what this rank asks of the others; after :meth:`read`, the sums over all ranks.
        faults: what is wrong with the terms, as far as this rank sees it; :meth:`read` tells every rank.
        lost: whether this rank's part is missing; after :meth:`read`, whether any rank's is.
        values: after :meth:`read`: the terms' sums by name.
        balance: after :meth:`read`: how evenly experts were used, by name; empty in a model without.
    """

    def __init__(
        self,
        ctx: ParallelContext,
        objective: Objective,
        counts: Mapping[str, Tensor | float] | None = None,
        each_layer: bool = False,
    ) -> None:
        self.objective, self.each_layer = objective, each_layer
        self.counts = dict(counts or {})
        self.found: dict[str, str] = {}
        self.experts = torch.zeros((3, 0, 0), dtype=torch.float64, device=ctx.device)
        self.layers = ExpertLayers()
        self.votes: Sequence[float] = ()
        self.faults: list[str] = []
        self.lost = False
        self.values: dict[str, float] = {}
        self.balance: dict[str, float] = {}
        self._ctx = ctx
        self._sums: dict[str, Tensor] = {}
        self._denominators: Mapping[str, str] = {}
        self._reduced = self.experts.flatten()

    def add(self, stage: HybridModel, told: tuple[Mapping[str, LossTerm], Tensor]) -> None:
        """Takes in what ``stage`` made of a micro-batch: terms without gradient, and int64 [3, its MoE layers, E]."""
        terms, experts = told
        for name, term in terms.items():
            self.found[name] = term.denominator
            value = term.sum.double() / term.layers
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if not self.experts.numel():
            self.experts = self.experts.new_zeros((3, stage.num_moe_layers, experts.shape[2]))
            self.layers = stage.experts
        self.experts[:, stage.moe_rows] += experts

    def own(self) -> dict[str, float]:
        """The terms' sums of this rank alone, also after :meth:`reduce`. The host waits for them."""
        return {name: float(value) for name, value in self._sums.items()}

    def reduce(self, denominators: Mapping[str, str]) -> None:
        """Sums over dp, cp and pp, and votes over all ranks; the host waits for nothing. Collective.

        Args:
            denominators: the terms of all ranks and their counts' names, the same everywhere.
        """
        new = self.found.items() - denominators.items()
        if new:
            name, by = min(new)
            self.faults.append(
                f"loss terms have the same names and counts in every step; {name!r}, by {by!r}, was not in the first"
            )
        self._denominators = denominators
        nothing = self._reduced.new_zeros(())
        terms = [self._sums.get(name, nothing).view(1) for name in denominators]
        asked = [*self.votes, float(self.lost), float(len(self.faults))]
        votes = upload(torch.tensor(asked, dtype=torch.float64), self._ctx.device)
        packed = torch.cat([*terms, votes, self.experts.flatten()])
        for axis in (self._ctx.dp_cp, self._ctx.pp):
            if axis.group is not None:
                dist.all_reduce(packed, group=axis.group)
        split = len(terms) + len(votes)
        if self._ctx.tp.group is not None:  # its ranks have equal sums, but one alone may have been asked
            dist.all_reduce(packed[len(terms) : split], group=self._ctx.tp.group)
        self._reduced, self.experts = packed[:split], packed[split:].view_as(self.experts)

    def read(self, others: Tensor | None = None) -> list[float]:
        """Brings the numbers to the host, and ``others`` (fp64 [n]) with them, whose values it returns.

        Here the host waits for the device: what a step reads, it reads here. Collective where something is wrong.

        Raises:
            UserError: on every rank, as some have found a fault.
        """
        single = {name: count for name, count in self.counts.items() if isinstance(count, Tensor)}
        single |= balance_numbers(self.experts, self.layers, self.each_layer)
        others = self._reduced[:0] if others is None else others
        numbers = iter(torch.cat([others, self._reduced, *(value.view(1) for value in single.values())]).tolist())
        taken = list(islice(numbers, len(others)))
        self.values = dict(zip(self._denominators, islice(numbers, len(self._denominators)), strict=True))
        *self.votes, lost, faults = islice(numbers, len(self.votes) + 2)
        self.lost = lost > 0
        if faults:
            found = enumerate(exchange(self._ctx, self.faults))
            raise UserError(describe_failures({rank: own[0] for rank, own in found if own}))
        for name, value in zip(single, numbers, strict=True):
            (self.counts if name in self.counts else self.balance)[name] = value
        return taken

    def means(self) -> dict[str, float]:
        """After :meth:`read`: every term, divided by its count.

        Raises:
            UserError: one is divided by what is not counted.
        """
        by = self._denominators
        return {name: self.values[name] / float(count_of(name, by[name], self.counts)) for name in by}
