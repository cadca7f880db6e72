"""The one place that knows which accelerator there is. Everything else takes its device from its input tensors."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaforge import control_groups
from megaforge.errors import UserError
from megaforge.registry import DEVICES

IS_HIP = torch.version.hip is not None  # a ROCm build, whose torch.cuda is AMD's GPUs


def set_gpu_environment(*, one_queue: bool, env: MutableMapping[str, str] = os.environ) -> None:
    """What CUDA and torch's allocator read from the environment when they start; what is set there stays.

    Args:
        one_queue: kernels start in the order in which the host gives them (``CUDA_DEVICE_MAX_CONNECTIONS=1``): a
            collective that is to overlap with a matrix product then really starts before it.
        env: the environment. Blocks of memory that grow (``expandable_segments``) do not fragment when shapes change.
    """
    if not IS_HIP and "PYTORCH_CUDA_ALLOC_CONF" not in env:  # the older name; ROCm has no such blocks
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if one_queue:
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


LARGEST_KEPT = 1 << 30  # bytes of a block of host memory that is kept for the next one of its size
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_host_memory(env: Mapping[str, str] = os.environ) -> bool:
    """Has glibc keep the host memory that is freed, in blocks of up to :data:`LARGEST_KEPT`, for what comes next.
    Otherwise each large tensor goes back to the kernel, which clears every page of the next one. What the environment
    says of malloc stays.

    Returns:
        Whether it has: not with another C library, or with settings of the user's.
    """
    given = any(name.startswith("MALLOC_") for name in env) or "glibc.malloc" in env.get("GLIBC_TUNABLES", "")
    if given or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, -1))


def give_back_host_memory() -> bool:
    """Gives what glibc's allocator keeps of freed memory back to the machine, once; whether it is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) >= 0


@dataclass(frozen=True)
class DeviceKind:
    """What the engine asks of a kind of device. A package adds one by an entry point of the group
    ``megaforge.devices``, a file by ``DEVICES.register``: either names a function without arguments that gives it.

    Attributes:
        type: of its ``torch.device``.
        backend: of torch.distributed, for its tensors.
        count: how many this process sees; None: one, which all ranks of a machine share.
        select: makes a device the current one.
        synchronize: waits for all that was started on a device.
        peak_bytes: the most bytes that torch has allocated on a device so far.
        memory: bytes of a device that are free now, and that it has in all.
        random_state, set_random_state: of its default generator, a uint8 tensor; None: it draws from the CPU's.
    """

    type: str
    backend: str
    count: Callable[[], int] | None
    select: Callable[[torch.device], None]
    synchronize: Callable[[torch.device], None]
    peak_bytes: Callable[[torch.device], int]
    memory: Callable[[torch.device], tuple[int, int]]
    random_state: Callable[[torch.device], torch.Tensor] | None = None
    set_random_state: Callable[[torch.Tensor, torch.device], None] | None = None

    @classmethod
    def of_module(cls, type: str, backend: str) -> DeviceKind:
        """The kind whose torch module (``torch.TYPE``, as of torch.cuda and of back ends of torch's PrivateUse1) has
        the functions of ``torch.cuda``."""
        module: Any = torch.get_device_module(type)
        return cls(
            type,
            backend,
            count=lambda: int(module.device_count()) if module.is_available() else 0,
            select=lambda device: module.set_device(device),
            synchronize=lambda device: module.synchronize(device),
            peak_bytes=lambda device: int(module.max_memory_allocated(device)),
            memory=lambda device: module.mem_get_info(device),
            random_state=lambda device: module.get_rng_state(device),
            set_random_state=lambda state, device: module.set_rng_state(state, device),
        )


def cpu() -> DeviceKind:
    """``--device cpu``."""
    return DeviceKind(
        "cpu",
        "gloo",
        count=None,
        select=lambda device: None,
        synchronize=lambda device: None,
        peak_bytes=lambda device: _peak_resident_bytes(),
        memory=lambda device: (host_memory_bytes(), host_memory_bytes()),
    )


def cuda() -> DeviceKind:
    """``--device cuda``: NVIDIA's GPUs, and with a ROCm build of torch AMD's."""
    return DeviceKind.of_module("cuda", "nccl")


def automatic() -> DeviceKind:
    """``--device auto``: a GPU where torch sees one."""
    return cuda() if torch.cuda.is_available() else cpu()


_kinds: dict[str, DeviceKind] = {}  # by type: those that were asked for


def kind_of(device: torch.device) -> DeviceKind:
    """The kind of ``device``; of meta tensors, which are nowhere, that of a CPU."""
    if device.type not in _kinds:
        _kinds[device.type] = cuda() if device.type == "cuda" else cpu()
    return _kinds[device.type]


def resolve_device(requested: str, local_rank: int = 0) -> torch.device:
    """Turns ``--device NAME`` into a device, which becomes the current one.

    Raises:
        UserError: there is no such device, or there are fewer than local ranks.
    """
    kind: DeviceKind = DEVICES.get(requested)()
    _kinds[kind.type] = kind
    if kind.count is None:
        device = torch.device(kind.type)
    else:
        count = kind.count()
        if not count:
            other = "; use --device cpu or install a CUDA or ROCm build of torch" if kind.type == "cuda" else ""
            raise UserError(f"--device {requested}: torch sees no {kind.type.upper()} device{other}")
        if local_rank >= count:
            raise UserError(
                f"--device {requested}: local rank {local_rank} has no device of its own ({count} visible); "
                f"start at most {count} processes on this node (--nproc-per-node {count})"
            )
        device = torch.device(kind.type, local_rank)
    kind.select(device)
    return device


def communication_backend(device: torch.device) -> str:
    """The torch.distributed backend that serves tensors of ``device``."""
    return kind_of(device).backend


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``. From host memory to a GPU it goes through pinned memory, and nobody waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def zeros_in_host_memory(like: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape and type of ``like`` in host memory, pinned where ``like`` is on a GPU (on meta: there)."""
    device = "meta" if like.device.type == "meta" else "cpu"
    return torch.zeros(like.shape, dtype=like.dtype, device=device, pin_memory=like.device.type == "cuda")


Mark = torch.cuda.Event | None  # a place in a queue; a CPU needs none


class Queue:
    """Work that a device does in order, beside its other queues: a CUDA stream. A CPU does everything at once."""

    def __init__(self, device: torch.device, *, current: bool = False) -> None:
        """``current``: the queue that everything goes to at present; else a new one."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device) if current else torch.cuda.Stream(device)

    @contextmanager
    def after(self, *marks: Mark) -> Iterator[None]:
        """What is started inside goes to this queue, behind ``marks`` of others."""
        if self._stream is None:
            yield
            return
        for mark in marks:
            if mark is not None:
                self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield

    def wait(self, mark: Mark) -> None:
        """What is started in this queue from now on comes behind ``mark`` of another. The host waits for nothing."""
        if self._stream is not None and mark is not None:
            self._stream.wait_event(mark)

    def mark(self) -> Mark:
        """The end of what is in the queue so far."""
        return None if self._stream is None else self._stream.record_event()


class Clock:
    """Times by a device's own clock, or by the host's where that does the work itself; the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> float | torch.cuda.Event:
        """A place in the device's work."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        """From one place to a later one; the device must have come to both."""
        if isinstance(begin, float) or isinstance(end, float):
            assert isinstance(begin, float) and isinstance(end, float)
            return end - begin
        return begin.elapsed_time(end) / 1000.0


Recorded = tuple[Callable[[], None], torch.Tensor]


def record_graph(step: Callable[[], torch.Tensor]) -> Recorded:
    """The kernels that ``step`` starts on the GPU, recorded as a CUDA graph: what starts them all again, on the same
    addresses, and the tensor that ``step`` gave, which that renews. ``step`` runs twice before.

    Raises:
        RuntimeError: it waits for the device, or does what a graph cannot hold.
    """
    beside, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step()  # kernels are compiled and chosen now
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def release_cached_memory(device: torch.device) -> None:
    """Gives back what torch's allocator keeps of freed memory on ``device``; a CPU keeps none."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Waits for queued work on ``device``; a CPU has none."""
    kind_of(device).synchronize(device)


def mark_profiled_range(*, begins: bool) -> None:
    """Tells a profiler outside, such as nsys, where the range that it should capture begins or ends."""
    (torch.cuda.profiler.start if begins else torch.cuda.profiler.stop)()


def host_memory_bytes(root: Path = control_groups.ROOT, groups: Path = control_groups.GROUPS) -> int:
    """Bytes of host memory that this process and those beside it may fill: what the machine has, or the smallest limit
    of the control groups that it is in (:func:`megaforge.control_groups.memory_limits`, which says what is given)."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    sizes += [limit for limit, _ in control_groups.memory_limits(root, groups)]
    return min(size for size in sizes if size > 0)


def host_memory_share(
    root: Path = control_groups.ROOT, groups: Path = control_groups.GROUPS, machine: Path = Path("/proc/meminfo")
) -> float:
    """How full host memory is now: the machine's, or that of the fullest control group that limits this process. What
    the kernel gives back when it is asked for, such as files that were read, does not count."""
    shares = [0.0]
    with suppress(OSError, ValueError, KeyError):
        lines = (line.split(":") for line in machine.read_text().splitlines())
        sizes = {name: int(size.split()[0]) for name, size in lines}
        shares.append(1 - sizes["MemAvailable"] / sizes["MemTotal"])
    limits = control_groups.memory_limits(root, groups)
    return max([*shares, *(used / limit for limit, used in limits if used is not None)])


def peak_memory_bytes(device: torch.device) -> int:
    """The most bytes allocated on ``device`` so far (on a CPU: the process's peak resident set)."""
    return kind_of(device).peak_bytes(device)


def _peak_resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_share(device: torch.device, ranks: int) -> float:
    """How full the memory of this rank was at its peak: what torch allocated on the GPU, and what lies there besides;
    on a CPU its peak resident set, of its part of the memory that the ``ranks`` of this machine share."""
    if device.type == "cpu":
        return peak_memory_bytes(device) * ranks / host_memory_bytes()
    free, total = kind_of(device).memory(device)
    besides = total - free - torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    return (peak_memory_bytes(device) + max(0, besides)) / total


def reserved_memory_bytes(device: torch.device) -> int:
    """The most bytes that torch's allocator has taken of the GPU ``device`` so far: what is above
    :func:`peak_memory_bytes` lay idle in its pool."""
    return int(torch.cuda.max_memory_reserved(device))


def page_faults() -> int:
    """Pages of memory that the kernel has given this process so far, without reading a disk."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def get_random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's default generators that code on ``device`` draws from: name -> uint8 [n], host memory."""
    states, kind = {"rng_cpu": torch.get_rng_state()}, kind_of(device)
    if kind.random_state is not None:
        states[_state_name(kind)] = kind.random_state(device)
    return states


def set_random_state(device: torch.device, states: dict[str, torch.Tensor]) -> None:
    """Takes back what :func:`get_random_state` gave."""
    torch.set_rng_state(states["rng_cpu"])
    kind = kind_of(device)
    if kind.set_random_state is not None:
        kind.set_random_state(states[_state_name(kind)], device)


def _state_name(kind: DeviceKind) -> str:
    return "rng_cuda" if kind.type == "cuda" else "rng_device"
