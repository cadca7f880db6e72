"""One rank's sends and receives of payloads, started without blocking in the order of its program."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.context import Axis
from megaforge.parallel.pipeline.actions import Schedule
from megaforge.parallel.pipeline.program import P2PBatch, Transfer
from megaforge.parallel.pipeline.stage_tensors import StageTensors, crossing_names

# Sends are waited for this many posts later: it bounds the sent tensors kept alive and delays nothing in practice.
SEND_WINDOW = 8


class Mailbox:
    """Point-to-point transfer of named tensors between pipeline ranks; no metadata is ever sent."""

    def __init__(self, schedule: Schedule, axis: Axis, payload: StageTensors, device: torch.device) -> None:
        self._schedule = schedule
        self._axis = axis
        self._payload = payload
        self._device = device
        self._crossing = crossing_names(schedule, payload)
        self._arriving: dict[Transfer, tuple[dict[str, Tensor], list[dist.Work]]] = {}
        self._leaving: deque[tuple[list[Tensor], list[dist.Work]]] = deque()

    def names(self, transfer: Transfer) -> list[str]:
        """What ``transfer`` consists of, in order: gradients only of differentiable tensors."""
        crossing = self._crossing[min(transfer.source_stage, transfer.target_stage)]
        if transfer.target_stage > transfer.source_stage:
            return list(crossing)
        return [name for name in crossing if self._payload[name].differentiable]

    def post(self, post: P2PBatch, outgoing: Callable[[Transfer], Mapping[str, Tensor]]) -> None:
        """Starts the transfers of ``post``; ``outgoing`` gives the tensors to send."""
        operations: list[dist.P2POp] = []
        sent: list[Tensor] = []
        # Where each received transfer's operations lie, because gloo gives one work per operation.
        received: list[tuple[Transfer, dict[str, Tensor], slice]] = []
        send_places: list[int] = []
        for transfer in post.transfers:
            sends = self._schedule.rank_of(transfer.source_stage) == self._axis.rank
            peer = self._schedule.rank_of(transfer.target_stage if sends else transfer.source_stage)
            tensors = self._contiguous(transfer, outgoing) if sends else self._buffers(transfer)
            first = len(operations)
            function = dist.isend if sends else dist.irecv
            operations += [dist.P2POp(function, t, group=self._axis.group, group_peer=peer) for t in tensors.values()]
            if sends:
                sent += tensors.values()
                send_places += range(first, len(operations))
            else:
                received.append((transfer, tensors, slice(first, len(operations))))
        works = dist.batch_isend_irecv(operations) if operations else []
        one_each = len(works) == len(operations)
        for transfer, tensors, place in received:
            self._arriving[transfer] = (tensors, works[place] if one_each else works)
        if sent:
            self._leaving.append((sent, [works[i] for i in send_places] if one_each else works))
        self._finish_sends(SEND_WINDOW)

    def take(self, transfer: Transfer) -> dict[str, Tensor]:
        """The received tensors of ``transfer``; waits until they are there."""
        tensors, works = self._arriving.pop(transfer)
        _wait(works)
        return tensors

    def finish(self) -> None:
        """Waits for everything sent."""
        self._finish_sends(0)

    def _finish_sends(self, keep: int) -> None:
        while len(self._leaving) > keep:
            _wait(self._leaving.popleft()[1])

    def _contiguous(
        self, transfer: Transfer, outgoing: Callable[[Transfer], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        tensors = outgoing(transfer)
        return {name: tensors[name].contiguous() for name in self.names(transfer)}

    def _buffers(self, transfer: Transfer) -> dict[str, Tensor]:
        specs = {name: self._payload[name] for name in self.names(transfer)}
        return {name: torch.empty(s.shape, dtype=s.dtype, device=self._device) for name, s in specs.items()}


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
