"""Weights that live on the first and on the last stage, such as an embedding that is also the head."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.context import Axis
from megaforge.parallel.pipeline.actions import Schedule


def tied_ranks(schedule: Schedule) -> tuple[int, int]:
    """The pipeline ranks of the first and of the last stage. Where they are equal (one rank, or a V-shaped schedule)
    both stages must hold the same parameter object, and nothing is to be summed."""
    return schedule.rank_of(0), schedule.rank_of(schedule.num_stages - 1)


def sum_tied_gradient(gradient: Tensor, schedule: Schedule, axis: Axis) -> None:
    """Replaces ``gradient`` on both tied ranks by the sum of their two, first stage's plus last stage's, to the bit
    the same on both, so that the two copies stay equal. Does nothing on the same rank; call it on tied ranks only,
    once per global batch, when the gradient is complete."""
    first, last = tied_ranks(schedule)
    if first == last:
        return
    other = torch.empty_like(gradient)
    peer = last if axis.rank == first else first
    send = dist.P2POp(dist.isend, gradient.contiguous(), group=axis.group, group_peer=peer)
    receive = dist.P2POp(dist.irecv, other, group=axis.group, group_peer=peer)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    gradient.copy_(gradient + other if axis.rank == first else other + gradient)
