"""AdamW whose moments lie in host memory."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megaforge.device import Mark, Queue
from megaforge.optim.adamw import AdamW
from megaforge.optim.main_parameters import MainParameter

MOMENTS = ("exp_avg", "exp_avg_sq")
BUFFERS = 3  # one is filled, one computed with, one emptied


class _Slice(NamedTuple):
    """Elements [start, stop) of a flattened parameter, and where they lie in a buffer."""

    main: MainParameter
    start: int
    stop: int
    place: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1)[self.start : self.stop]

    def in_buffer(self, buffer: Tensor) -> Tensor:
        return buffer[self.place : self.place + self.stop - self.start]


class PagedAdam(AdamW):
    """AdamW with its moments in host memory, for GPUs that they do not fit: they come and go in chunks, while the GPU
    updates others.

    The update is AdamW's, element by element. On a CPU nothing moves: the rule is AdamW bit for bit. On a GPU with
    bitsandbytes (github.com/bitsandbytes-foundation/bitsandbytes) that one updates, and pages in memory that CUDA
    manages.

    Attributes:
        chunk: elements that are moved at once.
    """

    host_state = True
    chunk: ClassVar[int] = 8 << 20

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        masters = [main.master for main in self.parameters]
        self._moves = _moves(masters)
        paged = _bitsandbytes() if self._moves and all(m.dtype == torch.float32 for m in masters) else None
        self._lent = paged is not None
        if paged is not None:
            self._moves, self.implementation = False, "bitsandbytes PagedAdamW32bit"
            return paged(groups, **self.arguments())
        self.implementation = "torch fused AdamW, moments in host memory" + (", moved in chunks" if self._moves else "")
        return torch.optim.AdamW(groups, fused=True, **self.arguments())

    def step(self, lr: float, done: int) -> None:
        if not self._moves:
            super().step(lr, done)
            return
        held = {id(main.master): main for main in self.parameters}
        work: list[tuple[dict[str, Any], list[_Slice]]] = []
        for group in self._optimizer.param_groups:
            settings = {"lr": lr * group["lr_mult"], "weight_decay": self.decay * group["decays"]}
            parameters = [held[id(master)] for master in group["params"]]
            work += [(settings, slices) for slices in _chunks(parameters, self.chunk)]
        self._run(work, done)

    def _take_up(self, done: int) -> None:
        """bitsandbytes makes buffers of its own, which become our state; it pages those of 100,000 elements up."""
        if not self._lent:
            super()._take_up(done)
            return
        optimizer: Any = self._optimizer
        held = {id(main.master): main for main in self.parameters}
        for number, group in enumerate(optimizer.param_groups):
            for index, master in enumerate(group["params"]):
                if not optimizer.state[master]:
                    optimizer.init_state(group, master, number, index)
                state, ours = optimizer.state[master], held[id(master)].state
                for name, theirs in zip(MOMENTS, ("state1", "state2"), strict=True):
                    ours[name] = state[theirs].copy_(ours[name])
                state["step"] = done

    def _run(self, work: Sequence[tuple[dict[str, Any], list[_Slice]]], done: int) -> None:
        """Chunk i is updated while i + 1 arrives and i - 1 leaves."""
        master = self.parameters[0].master
        size = max(slices[-1].place + slices[-1].stop - slices[-1].start for _, slices in work)
        buffers = [[master.new_empty(size, requires_grad=False) for _ in MOMENTS] for _ in range(BUFFERS)]
        compute, arrive, leave = Queue(master.device, current=True), Queue(master.device), Queue(master.device)
        begun = compute.mark()  # the buffers are this queue's until here, and what left in the last step has left
        free: list[Mark] = [begun] * BUFFERS
        arrived: dict[int, Mark] = {}

        def bring(index: int) -> None:
            with arrive.after(begun, free[index % BUFFERS]):
                for piece in work[index][1]:
                    for name, buffer in zip(MOMENTS, buffers[index % BUFFERS], strict=True):
                        piece.in_buffer(buffer).copy_(piece.of(piece.main.state[name]), non_blocking=True)
            arrived[index] = arrive.mark()

        bring(0)
        for index, (settings, slices) in enumerate(work):
            if index + 1 < len(work):
                bring(index + 1)
            own = buffers[index % BUFFERS]
            with compute.after(arrived.pop(index)):
                self._update(settings, slices, own, done)
            with leave.after(compute.mark()):
                for piece in slices:
                    for name, buffer in zip(MOMENTS, own, strict=True):
                        piece.of(piece.main.state[name]).copy_(piece.in_buffer(buffer), non_blocking=True)
            free[index % BUFFERS] = leave.mark()
        with compute.after(*free):  # the buffers may be used for other things, and the moments be fetched again
            pass

    def _update(self, settings: dict[str, Any], slices: list[_Slice], moments: list[Tensor], done: int) -> None:
        steps = torch.full((len(slices),), float(done), device=moments[0].device)
        beta1, beta2 = self.arguments()["betas"]
        adamw(
            [piece.of(piece.main.master) for piece in slices],
            [piece.of(piece.main.grad) for piece in slices],
            [piece.in_buffer(moments[0]) for piece in slices],
            [piece.in_buffer(moments[1]) for piece in slices],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            eps=self.config.adam_eps,
            maximize=False,
            **settings,
        )


def _bitsandbytes() -> Callable[..., torch.optim.Optimizer] | None:
    """Its paged AdamW with moments in fp32, where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    try:
        return getattr(importlib.import_module("bitsandbytes.optim"), "PagedAdamW32bit", None)
    except (ImportError, OSError, RuntimeError):  # its library does not load here
        return None


def _moves(masters: Sequence[Tensor]) -> bool:
    """Whether moments in host memory are not where the masters are."""
    return any(master.device.type == "cuda" for master in masters)


def _chunks(parameters: Sequence[MainParameter], size: int) -> Iterator[list[_Slice]]:
    """All elements of ``parameters`` in their order, ``size`` at a time."""
    chunk: list[_Slice] = []
    filled = 0
    for main in parameters:
        start, count = 0, main.master.numel()
        while start < count:
            stop = min(count, start + size - filled)
            chunk.append(_Slice(main, start, stop, filled))
            filled += stop - start
            start = stop
            if filled == size:
                yield chunk
                chunk, filled = [], 0
    if chunk:
        yield chunk
