"""Counts the bytes of tensors that are alive while code runs, for real tensors and for ones on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megaforge.kernels.moe_routing import Route
from megaforge.kernels.wkv7.native import FEW_TOKENS, STATES_BETWEEN


class StorageMeter(TorchDispatchMode):
    """Follows every storage that an operation makes, forward or backward, until it is freed.

    Attributes:
        live: bytes alive now, of storages made inside the mode.
        peak: the most they have been.
        scratch: bytes that the newest operation needed beside what it has made.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """``known``: tensors whose storages do not count (parameters, gradient buffers)."""
        super().__init__()
        self.live = self.peak = self.scratch = 0
        self._seen: set[int] = {storage_key(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.call(func, args, kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak, self.scratch = max(self.peak, self.live + self.scratch), 0
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs one operation."""
        return func(*args, **kwargs)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def is_alive(self, key: int) -> bool:
        """Whether the storage of this :func:`storage_key` is."""
        return key in self._seen

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def storage_key(tensor: Tensor) -> int:
    """What tells the storage of ``tensor`` from all others that are alive."""
    return tensor.untyped_storage()._cdata


class MetaRun(StorageMeter):
    """Runs model code on the meta device: no memory, no arithmetic, no peers.

    Collectives of a fake process group return at once. Where code waits for numbers from the device, the rows of each
    expert, it gets those of an even spread of the assignments that were routed last.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__(known)
        self.num_experts, self.assignments = 1, 0
        aten = torch.ops.aten
        self._special: dict[Any, Callable[..., Any]] = {
            torch.ops.megaforge.moe_route.default: self._route,
            torch.ops.megaforge.wkv7_backward.default: self._wkv7_backward,
            aten._to_copy.default: self._to_host,
        }

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "meta":  # what is on the host (states of random generators) takes no device memory
            super()._follow(storage)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        special = self._special.get(func)
        return func(*args, **kwargs) if special is None else special(func, args, kwargs)

    def _route(self, func: Any, args: Any, kwargs: Any) -> Any:
        results = func(*args, **kwargs)
        route = Route(*results)
        self.num_experts, self.assignments = route.counts.shape[1], route.experts.numel()
        return results

    def _wkv7_backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """On GPUs it computes states again, where few are kept."""
        states, interval = args[7], args[-1]
        if interval == FEW_TOKENS:
            self.scratch = STATES_BETWEEN * states[0].numel() * torch.float32.itemsize
        return func(*args, **kwargs)

    def _to_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        device = kwargs.get("device")
        if args[0].device.type != "meta" or device is None or device.type != "cpu":
            return func(*args, **kwargs)
        place = torch.arange(args[0].numel()) % self.num_experts
        until = (place + 1) * self.assignments // self.num_experts
        counts = until - place * self.assignments // self.num_experts
        return counts.view(args[0].shape).to(args[0].dtype)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Takes the fused attention kernel where torch would write out all scores: it does so on the meta device."""
    kernel, plain = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
        if key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return kernel(query, key, value, 0.0, bool(options.get("is_causal")), attn_mask=attn_mask)[0]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
