"""Which ranks share a machine, and who keeps a copy for whom."""

from __future__ import annotations

import pytest

from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.resilience.nodes import Nodes, find_nodes


def test_each_rank_has_a_peer_on_the_next_node():
    nodes = Nodes(((0, 1), (2, 3), (4, 5)), 3)
    assert (nodes.own, nodes.leads, nodes.place) == (1, False, 1)
    assert [nodes.peer(rank) for rank in range(6)] == [2, 3, 4, 5, 0, 1]
    uneven = Nodes(((0, 1, 2), (3,)))
    assert [uneven.peer(rank) for rank in range(4)] == [3, 3, 3, 0], "all of a node's files are somewhere else too"
    assert Nodes(((0, 1),)).peer(1) is None


def test_nodes_by_number_and_by_machine():
    ctx = ParallelContext.of_rank(2, 4)
    assert find_nodes(ctx, 2) == Nodes(((0, 1), (2, 3)), 2)
    with pytest.raises(UserError, match="--snapshot-ranks-per-node 3: 4 ranks"):
        find_nodes(ctx, 3)
    assert find_nodes(ParallelContext.single()) == Nodes(((0,),), 0)
