"""Activations in host memory between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostMemory(saved_tensors_hooks):
    """While active, what autograd keeps on a GPU for the backward pass is kept in pinned host memory instead.

    As :class:`torch.autograd.graph.save_on_cpu`, but weights, which autograd keeps too, stay where they are. Copies run
    in order with the computation, so it is as much slower as the bus is; the host does not wait for them. On the meta
    device, where the planner measures, they are only counted.

    Attributes:
        moved: bytes that went to host memory. A tensor that several operations keep goes as often.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.moved = 0
        own = {weight.untyped_storage()._cdata for weight in weights}

        def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
            if tensor.device.type == "cpu" or tensor.untyped_storage()._cdata in own:
                return tensor.device, tensor
            self.moved += tensor.nbytes
            if tensor.device.type == "meta":
                return tensor.device, torch.empty((), dtype=tensor.dtype).expand(tensor.shape)
            host = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=True)
            return tensor.device, host.copy_(tensor, non_blocking=True)  # what reads it waits on the same stream

        def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
            device, tensor = packed
            return tensor if tensor.device == device else tensor.to(device, non_blocking=True)

        super().__init__(pack, unpack)
