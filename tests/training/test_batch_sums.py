"""Numbers of a global batch that are read at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megaforge.config.expert_layers import ExpertLayers
from megaforge.errors import UserError
from megaforge.nn.losses import LossTerm
from megaforge.parallel.context import ParallelContext
from megaforge.training.batch_sums import BatchSums
from tests.parallel.pool import RankPool

COUNTS = {"sequences": 4.0, "labels": torch.tensor(10.0, dtype=torch.float64)}


class Stage(nn.Module):
    """What sums ask of a stage that has the second of two MoE layers."""

    num_moe_layers, moe_rows, experts = 2, slice(1, 2), ExpertLayers(("0.ffn", "1.ffn"), (2, 2))


def term(value: float, count: str) -> LossTerm:
    return LossTerm(torch.tensor(value, dtype=torch.float32), count)


def test_all_numbers_come_back_under_their_names() -> None:
    sums = BatchSums(ParallelContext.single(), None, COUNTS)  # type: ignore[arg-type]
    experts = torch.tensor([[[3, 1]], [[2, 2]], [[3, 1]]])
    for value in (20.0, 5.0):
        sums.add(Stage(), ({"loss": term(value, "labels"), "z": term(1.0, "sequences")}, experts))  # type: ignore[arg-type]
    sums.votes = [1.0, 0.0]
    sums.reduce(sums.found)
    assert sums.read(torch.tensor([7.0, 8.0], dtype=torch.float64)) == [7.0, 8.0]
    assert sums.means() == {"loss": 2.5, "z": 0.5} and sums.values == {"loss": 25.0, "z": 2.0}
    assert sums.votes == [1.0, 0.0] and sums.counts == {"sequences": 4.0, "labels": 10.0}
    assert sums.experts.tolist() == [[[0, 0], [6, 2]], [[0, 0], [4, 4]], [[0, 0], [6, 2]]]
    assert sums.balance == {
        "expert_entropy_bits": pytest.approx(0.8112781 / 2),
        "expert_max_load": 1.5,
        "experts_used": 0.5,
    }


def test_votes_and_nothing_else() -> None:
    sums = BatchSums(ParallelContext.single(), None)  # type: ignore[arg-type]
    sums.votes = [1.0, 0.0]
    sums.reduce({})
    assert sums.read() == []
    assert (sums.votes, sums.values, sums.means(), sums.balance) == ([1.0, 0.0], {}, {}, {})


def test_a_mean_over_what_is_not_counted_is_named() -> None:
    sums = BatchSums(ParallelContext.single(), None)  # type: ignore[arg-type]
    sums.reduce({"loss": "labels"})
    sums.read()
    with pytest.raises(UserError, match="'loss' is divided by 'labels', which is not counted; counts are none"):
        sums.means()


def summed(sizes: dict[str, int]) -> tuple[dict[str, float], list[float]]:
    """A rank that has seen "loss" or, on the first stage, only "z"; every second rank votes."""
    ctx = ParallelContext.create(**sizes)
    sums = BatchSums(ctx, None, {"labels": 1.0})  # type: ignore[arg-type]
    name = "loss" if ctx.pp.rank == ctx.pp.size - 1 else "z"
    sums.add(Stage(), ({name: term(2.0**ctx.dp_cp.rank, "labels")}, torch.zeros(3, 1, 2)))  # type: ignore[arg-type]
    sums.votes = [float(ctx.world.rank == 3)]
    sums.reduce({"loss": "labels", "z": "labels"})
    sums.read()
    return sums.values, list(sums.votes)


@pytest.mark.parametrize(
    ("sizes", "values"),
    [({"tp": 2, "pp": 2}, (1.0, 1.0)), ({"pp": 2}, (3.0, 3.0)), ({"cp": 2}, (15.0, 0.0))],
)
def test_every_rank_has_the_sums_of_all(ranks: RankPool, sizes: dict[str, int], values: tuple[float, float]) -> None:
    for found, votes in ranks.run(4, summed, sizes):
        assert found == {"loss": values[0], "z": values[1]} and votes == [1.0]
