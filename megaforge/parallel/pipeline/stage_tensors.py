"""What travels between pipeline stages: named tensors whose shapes and dtypes are agreed once, before the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megaforge.parallel.pipeline.actions import Schedule


@dataclass(frozen=True)
class StageTensor:
    """One named tensor between stages.

    Attributes:
        shape, dtype: of the tensor and of its gradient, the same for all microbatches of a run.
        carried: False for a tensor that every stage makes anew (the hidden states). True for one that stage
            ``made_by`` makes and all later stages read unchanged (RWKV-7's v_first, document ids): it is sent once to
            every physical rank, kept there for its later chunks, and its gradient, summed over all later stages,
            comes back once from every rank.
        made_by: the stage that makes a carried tensor.
        differentiable: whether a gradient comes back.
        read_until: the last stage that reads a carried tensor; it is not sent further. None: the last of all.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    carried: bool = False
    made_by: int = 0
    differentiable: bool = True
    read_until: int | None = None


StageTensors = Mapping[str, StageTensor]


def crossing_names(schedule: Schedule, payload: StageTensors) -> list[tuple[str, ...]]:
    """``names[s]``: what goes from stage s to stage s+1, in the order in which it is sent.

    A carried tensor goes only where its rank does not hold it yet; with equal ranks of both stages, nothing carried
    goes at all.
    """
    names = []
    for stage in range(schedule.num_stages - 1):
        receiver = schedule.rank_of(stage + 1)
        crossing = []
        for name, tensor in sorted(payload.items()):
            holders = {schedule.rank_of(s) for s in range(tensor.made_by, stage + 1)}
            last = schedule.num_stages - 1 if tensor.read_until is None else tensor.read_until
            if not tensor.carried or (tensor.made_by <= stage < last and receiver not in holders):
                crossing.append(name)
        names.append(tuple(crossing))
    return names
