"""Joining the other ranks, however they were launched."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from megaforge.config.launcher import Launch, check_address, discover_launch, print_rank_0, srun_address
from megaforge.device import communication_backend, synchronize
from megaforge.errors import UserError
from megaforge.parallel.rendezvous import meet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "RECORDER",
    "Launch",
    "check_backend",
    "connect",
    "discover_launch",
    "initialize",
    "open_store",
    "print_rank_0",
    "shutdown",
]

# torch's flight recorder: the newest collectives of each rank, which a run that hangs tells of.
RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def _mpi_address(launch: Launch) -> tuple[str, int]:
    """Rank 0 picks a free port of its host and tells the others through MPI."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"started by {launch.launcher} without MASTER_ADDR/MASTER_PORT, and mpi4py is not there to agree on an "
            f"address ({error}); export both variables or install it: pip install 'megaforge[mpi]'"
        ) from error
    offer: tuple[str, int] | None = None
    if launch.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            offer = ("127.0.0.1" if _one_node(MPI) else socket.getfqdn(), probe.getsockname()[1])
    else:
        _ = _one_node(MPI)
    address: tuple[str, int] = MPI.COMM_WORLD.bcast(offer, root=0)
    return address


def _one_node(mpi: Any) -> bool:
    """Whether all MPI ranks share a host (collective)."""
    return len(set(mpi.COMM_WORLD.allgather(socket.gethostname()))) == 1


def initialize(device: Any, backend: str = "auto", timeout_minutes: float = 30.0) -> Launch:
    """Joins the default process group when the launcher started more than one process.

    Args:
        device: this rank's torch.device; decides what ``auto`` means.
        backend: auto, gloo, nccl or mpi.
        timeout_minutes: after which a collective that does not end aborts.

    Raises:
        UserError: the backend is not part of the installed torch, or the ranks have no address to meet at.
    """
    launch = discover_launch()
    if launch.world_size == 1:
        return launch
    check_backend(backend)
    chosen = communication_backend(device) if backend == "auto" else backend
    _export(launch)
    for name, value in RECORDER.items():
        os.environ.setdefault(name, value)
    # Bound to its device, NCCL connects the ranks here and splits its groups off; else at each group's first use.
    bound: dict[str, Any] = {"device_id": torch.device(device)} if chosen == "nccl" else {}
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store = meet(launch.rank, launch.world_size, timeout)
    dist.init_process_group(
        chosen, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout, **bound
    )
    return launch


def connect(groups: Iterable[ProcessGroup], device: torch.device) -> None:
    """One small collective on each of ``groups`` that NCCL serves: what cannot connect fails here by name, and no
    pipeline stage sends before all ranks of its group are there. Collective; every rank gives its groups in one order.
    """
    for group in groups:
        if "nccl" in dist.get_backend(group):
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    synchronize(device)


def open_store() -> Store:
    """Where the ranks that the launcher started leave each other notes, without a process group. Collective.

    Raises:
        UserError: they have no address to meet at.
    """
    launch = discover_launch()
    _export(launch)
    return meet(launch.rank, launch.world_size, datetime.timedelta(minutes=30))


def check_backend(backend: str) -> None:
    """Checks that the installed torch has ``--distributed-backend``.

    Raises:
        UserError: it was built without.
    """
    if backend == "mpi" and not dist.is_mpi_available():
        raise UserError(
            "--distributed-backend mpi: the installed torch was built without MPI; use --distributed-backend gloo "
            "(mpirun may still launch the ranks) or a torch built from source with MPI"
        )
    if backend == "nccl" and not dist.is_nccl_available():
        raise UserError("--distributed-backend nccl: this torch was built without NCCL; use --distributed-backend gloo")


def _export(launch: Launch) -> None:
    """Writes what torchrun would have written, so that env:// rendezvous and libraries find it."""
    check_address(launch)
    if launch.launcher == "torchrun":
        return
    if launch.launcher == "srun":
        os.environ.update(srun_address())
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        host, port = _mpi_address(launch)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))


def shutdown() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
