"""Who this rank is along every axis of parallelism: one frozen object, made once, passed to what needs it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Slowest to fastest, which is Megatron-LM's default rank order tp-cp-ep-dp-pp read backwards: tensor-parallel
# neighbours are neighbouring ranks. Expert parallelism will fold into dp, cp and tp and is no axis of this mesh.
MESH_AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Axis:
    """One axis of parallelism as this rank sees it; ``group`` is None when the axis has size one."""

    name: str
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class ParallelContext:
    """All axes of this rank, and its device. A world of one is the same object with axes of size one."""

    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    ep: Axis
    world: Axis
    device: torch.device
    mesh: DeviceMesh | None = None

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """The context of a process on its own; needs no process group."""
        axes = {name: Axis(name) for name in ("tp", "cp", "dp", "pp", "ep", "world")}
        return cls(device=torch.device(device), **axes)

    @classmethod
    def create(
        cls, *, tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1, device: torch.device | str = "cpu"
    ) -> ParallelContext:
        """The context of this rank in the initialised default process group; dp is what the other sizes leave.

        The layout must have been checked (:func:`megaforge.config.check_layout.check_layout`).
        """
        device = torch.device(device)
        if not dist.is_initialized():
            return cls.single(device)
        world_size = dist.get_world_size()
        dp = world_size // (tp * cp * pp)
        mesh = init_device_mesh(device.type, (pp, dp, cp, tp), mesh_dim_names=MESH_AXES)
        axes = {}
        for name in MESH_AXES:
            size = mesh.size(MESH_AXES.index(name))
            group = mesh.get_group(name) if size > 1 else None
            axes[name] = Axis(name, size, mesh.get_local_rank(name), group)
        world = Axis("world", world_size, dist.get_rank(), dist.group.WORLD if world_size > 1 else None)
        return cls(device=device, mesh=mesh, world=world, ep=Axis("ep", ep, 0), **axes)

    def axis(self, name: str) -> Axis:
        """The axis called ``name`` (tp, cp, dp, pp, ep or world)."""
        return getattr(self, name)

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank speaks for the run (prints, writes metrics)."""
        return self.world.rank == 0

    def with_axis(self, name: str, size: int, rank: int) -> ParallelContext:
        """A copy whose axis ``name`` pretends to be ``rank`` of ``size`` without a group: what offline tools and
        planners use to ask what another rank would hold."""
        return dataclasses.replace(self, **{name: Axis(name, size, rank)})
