"""Activations in host memory between the forward and the backward pass."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megaforge.device import Mark, Queue

# Tensors on their way out that may still take memory, and tensors that are brought back before they are asked for.
AHEAD = 3


class _Counted(NamedTuple):
    """What would be in host memory."""

    shape: torch.Size
    dtype: torch.dtype


class _Moved:
    """A tensor that went to host memory.

    Attributes:
        host: where it is.
        device: where it was.
        gone: after which it is there.
        before: the one that went before it, which the backward pass is likely to want after it.
        back: itself again, once it is on its way; there after ``arrived``.
    """

    def __init__(self, host: Tensor, device: torch.device, gone: Mark, before: weakref.ref[_Moved] | None) -> None:
        self.host, self.device, self.gone, self.before = host, device, gone, before
        self.back: Tensor | None = None
        self.arrived: Mark = None

    def __del__(self) -> None:
        if self.back is not None:  # nobody asked for it: its memory must not be used again while it arrives
            Queue(self.device, current=True).wait(self.arrived)


class HostMemory(saved_tensors_hooks):
    """While active, what autograd keeps on a GPU for the backward pass is kept in pinned host memory instead.

    As :class:`torch.autograd.graph.save_on_cpu`, but weights, which autograd keeps too, stay where they are, and copies
    go beside the computation, in queues of their own: out while the next layers compute, and back :data:`AHEAD` tensors
    before the backward pass asks for them, in the opposite order. The host waits for none. The computation waits where
    it would be more tensors ahead of the copies than that, so that memory stays bounded by as many. On the meta device,
    where the planner measures, they are only counted.

    Attributes:
        moved: bytes that went to host memory. A tensor that several operations keep goes as often.
        ahead: bytes of the :data:`AHEAD` neighbours that take most: what is on its way out, or back too early.
    """

    def __init__(self, weights: Iterable[Tensor], device_type: str = "cuda") -> None:
        """``device_type``: that of the devices whose tensors go."""
        self.moved = self.ahead = 0
        newest: deque[int] = deque(maxlen=AHEAD)
        own = {weight.untyped_storage()._cdata for weight in weights}
        self._queues: dict[torch.device, tuple[Queue, Queue]] = {}  # out and back
        self._going: deque[tuple[Tensor, Mark]] = deque()
        self._last: weakref.ref[_Moved] | None = None

        def pack(tensor: Tensor) -> Tensor | _Moved | _Counted:
            kind = tensor.device.type
            if kind not in (device_type, "meta") or tensor.untyped_storage()._cdata in own:
                return tensor
            self.moved += tensor.nbytes
            newest.append(tensor.nbytes)
            self.ahead = max(self.ahead, sum(newest))
            if kind == "meta":
                return _Counted(tensor.shape, tensor.dtype)
            return self._send(tensor)

        def unpack(packed: Tensor | _Moved | _Counted) -> Tensor:
            if isinstance(packed, _Counted):
                return torch.empty(packed.shape, dtype=packed.dtype, device="meta")
            return self._bring(packed) if isinstance(packed, _Moved) else packed

        super().__init__(pack, unpack)

    def _send(self, tensor: Tensor) -> _Moved:
        device, current = tensor.device, Queue(tensor.device, current=True)
        if device not in self._queues:
            self._queues[device] = Queue(device), Queue(device)
        out, _ = self._queues[device]
        with out.after(current.mark()):
            pinned = device.type == "cuda"
            host = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned)
            host.copy_(tensor, non_blocking=True)
        # Held until the computation has waited for the copy: then its memory may be used again, in order.
        self._going.append((tensor, out.mark()))
        self._let_go(current, AHEAD)
        moved = _Moved(host, device, self._going[-1][1], self._last)
        self._last = weakref.ref(moved)
        return moved

    def _let_go(self, current: Queue, keep: int) -> None:
        while len(self._going) > keep:
            current.wait(self._going[0][1])
            self._going.popleft()

    def _bring(self, moved: _Moved) -> Tensor:
        current = Queue(moved.device, current=True)
        self._let_go(current, 0)
        following: _Moved | None = moved
        for _ in range(AHEAD + 1):
            if following is None:
                break
            self._start(following, current)
            following = None if following.before is None else following.before()
        current.wait(moved.arrived)
        tensor, moved.back = moved.back, None
        assert tensor is not None
        return tensor

    def _start(self, moved: _Moved, current: Queue) -> None:
        """Sets ``moved`` on its way back, into memory of the computation's own queue."""
        if moved.back is not None:
            return
        _, back = self._queues[moved.device]
        moved.back = torch.empty(moved.host.size(), dtype=moved.host.dtype, device=moved.device)
        back.wait(moved.gone)
        with back.after(current.mark()):
            moved.back.copy_(moved.host, non_blocking=True)
        moved.arrived = back.mark()
