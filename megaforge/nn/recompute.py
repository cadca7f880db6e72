"""Activation recomputation: a part of the forward pass keeps its inputs only and runs again in the backward pass.

The idea is that of torch.utils.checkpoint without reentrance (Chen et al., arXiv 1604.06174). That module forgets what
it computed again with the call of the autograd engine that asked for it; a backward pass in two halves
(:mod:`megaforge.parallel.pipeline.split_backward`) makes many calls. Here a tensor lives as long as a node of the graph
may ask for it: the part runs again once, in the first half, and what the second half needs stays until then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megaforge.device import get_random_state, set_random_state
from megaforge.parallel.pipeline.split_backward import is_needed_again


def recomputed(active: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``; when ``active`` and gradients are wanted, nothing inside it is kept for the backward pass,
    which computes it again.

    The function must only return what it computes: a count it added to somewhere else would be added twice. Random
    states are set back for the second run. Every output may carry gradient, so router losses and RWKV's v_first are
    outputs like any other.
    """
    if not (active and torch.is_grad_enabled()):
        return function(*inputs)
    part = _Part(function, inputs)
    with saved_tensors_hooks(part.keep_place, _Place.take):
        return function(*inputs)


class _Place:
    """Stands in the graph for a tensor that is there only after its part has run again.

    A node asks once in each run: what only the first half of a split backward pass needs is let go at once.
    """

    __slots__ = ("part", "shape", "value", "__weakref__")

    def __init__(self, part: _Part, shape: torch.Size) -> None:
        self.part, self.shape = part, shape
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        if self.value is None:
            self.part.run_again()
        value = self.value
        if value is None:
            raise RuntimeError("a recomputed part of the model kept fewer tensors than at first")
        if not is_needed_again(torch._C._current_autograd_node()):
            self.value = None
        return value


class _Complete(Exception):
    """Everything that the graph keeps has been computed again; what follows is not needed."""


class _Inputs(torch.autograd.Function):
    """Computes nothing. Its node keeps the tensors of the inputs as any node does, so that hooks around the part (host
    memory) get hold of them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty((0,))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("only keeps tensors")


class _Part:
    """One call of a function whose intermediate tensors are not kept."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self._function = function
        tensors = {index: value for index, value in enumerate(inputs) if isinstance(value, Tensor)}
        self._others = [None if index in tensors else value for index, value in enumerate(inputs)]
        self._indices = list(tensors)
        # The output, not its node alone: without one torch 2.11 lets go of what the node keeps.
        self._inputs = _Inputs.apply(torch.empty((0,), requires_grad=True), *tensors.values())
        self._device = next(iter(tensors.values())).device
        self._random_state = get_random_state(self._device)
        self._places: list[weakref.ref[_Place]] = []  # the graph alone decides how long one lives

    def keep_place(self, tensor: Tensor) -> _Place:
        place = _Place(self, tensor.shape)
        self._places.append(weakref.ref(place))
        return place

    def run_again(self) -> None:
        """Fills every place that the graph still has."""
        inputs = list(self._others)
        for index, tensor in zip(self._indices, self._inputs.grad_fn.saved_tensors, strict=True):
            inputs[index] = tensor
        remaining = iter(self._places)
        missing = len(self._places)

        def fill(tensor: Tensor) -> None:
            nonlocal missing
            place = next(remaining)()
            if place is not None and place.shape != tensor.shape:
                raise RuntimeError(
                    f"a recomputed part of the model made a tensor of shape {tuple(tensor.shape)} where it was "
                    f"{tuple(place.shape)}: it does not depend on its inputs alone"
                )
            if place is not None:
                place.value = tensor.detach()
            missing -= 1
            if not missing:
                raise _Complete

        now = get_random_state(self._device)
        set_random_state(self._device, self._random_state)
        try:
            with torch.enable_grad(), saved_tensors_hooks(fill, _never):
                self._function(*inputs)
        except _Complete:
            pass
        finally:
            set_random_state(self._device, now)


def _never(_: None) -> Tensor:
    raise RuntimeError("the second run's own graph is not differentiated")
