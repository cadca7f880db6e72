"""Which ranks share a machine, and so its memory; and which rank of another machine keeps a copy of what one has."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megaforge.errors import UserError
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext


@dataclass(frozen=True)
class Nodes:
    """The ranks of each machine.

    Attributes:
        members: ranks of each node, ascending; nodes by their first rank.
        rank: this one.
    """

    members: tuple[tuple[int, ...], ...]
    rank: int = 0

    @property
    def own(self) -> int:
        """Number of this rank's node."""
        return self.of(self.rank)

    @property
    def leads(self) -> bool:
        """Whether this rank is its node's first, which does what is done once a node."""
        return self.members[self.own][0] == self.rank

    @property
    def place(self) -> int:
        """Number of this rank in its node."""
        return self._places[self.rank][1]

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """Of each rank, its node's number and its own number there."""
        return {rank: (node, own) for node, ranks in enumerate(self.members) for own, rank in enumerate(ranks)}

    def of(self, rank: int) -> int:
        """Number of the node of ``rank``."""
        return self._places[rank][0]

    def peer(self, rank: int) -> int | None:
        """The rank that keeps a copy for ``rank``: of the same number on the next node; None where there is no other
        node."""
        if len(self.members) == 1:
            return None
        node, own = self._places[rank]
        following = self.members[(node + 1) % len(self.members)]
        return following[own % len(following)]


def find_nodes(ctx: ParallelContext, ranks_per_node: int | None = None) -> Nodes:
    """The machines of the run. Collective.

    Args:
        ranks_per_node: makes every so many ranks in a row a node, whatever machine they are on.

    Raises:
        UserError: on every rank: ``ranks_per_node`` does not divide the ranks.
    """
    size = ctx.world.size
    if ranks_per_node is not None:
        if size % ranks_per_node:
            raise UserError(
                f"--snapshot-ranks-per-node {ranks_per_node}: {size} ranks do not make whole nodes; use a divisor"
            )
        return Nodes(tuple(tuple(range(r, r + ranks_per_node)) for r in range(0, size, ranks_per_node)), ctx.world.rank)
    by_machine: dict[str, list[int]] = {}
    for rank, machine in enumerate(exchange(ctx, machine_name())):
        by_machine.setdefault(machine, []).append(rank)
    return Nodes(tuple(map(tuple, by_machine.values())), ctx.world.rank)


def machine_name() -> str:
    """Host name and the kernel's number of this boot: two machines of one name are two, as are two containers that
    have names of their own."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot}"
