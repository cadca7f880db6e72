"""Who this rank is along every axis of parallelism: one frozen object, made once, passed to what needs it."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megaforge.parallel.distributed import connect

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Slowest to fastest, which is Megatron-LM's default rank order tp-cp-ep-dp-pp read backwards: tensor-parallel
# neighbours are neighbouring ranks. Three meshes fold the same ranks differently: attention and dense layers, experts
# (whose etp x ep x edp equals tp x cp x dp, "parallel folding"), and replicas of dense parameters.
DENSE_MESH = ("pp", "dp", "cp", "tp")
EXPERT_MESH = ("pp", "edp", "ep", "etp")
REPLICA_MESH = ("pp", "dp_cp", "tp")
AXES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp", "dp_cp", "world")


@dataclass(frozen=True)
class Axis:
    """One axis of parallelism as this rank sees it; ``group`` is None when the axis has size one."""

    name: str
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class ParallelContext:
    """All axes of this rank, and its device. A world of one is the same object with axes of size one.

    Dense layers are laid out over tp, cp, dp and pp; experts over etp (their inner width), ep (which experts) and edp
    (their replicas), folded from the same ranks of a pipeline stage. ``dp_cp`` are the replicas of a dense parameter.

    Attributes:
        control: all ranks once more, in a group for what is in host memory (checkpoints, agreements, barriers), which
            never waits for a device or for gradients on their way; None where there is nobody else.
    """

    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    ep: Axis
    etp: Axis
    edp: Axis
    dp_cp: Axis
    world: Axis
    device: torch.device
    control: ProcessGroup | None = None

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """The context of a process on its own; needs no process group."""
        return cls._of_axes(torch.device(device), {name: Axis(name) for name in AXES})

    @classmethod
    def _of_axes(
        cls, device: torch.device, axes: dict[str, Axis], control: ProcessGroup | None = None
    ) -> ParallelContext:
        fields: dict[str, Any] = dict(axes)
        return cls(device=device, control=control, **fields)

    @classmethod
    def of_rank(
        cls,
        rank: int,
        world_size: int,
        *,
        tp: int = 1,
        cp: int = 1,
        pp: int = 1,
        ep: int = 1,
        etp: int | None = None,
        device: torch.device | str = "cpu",
    ) -> ParallelContext:
        """Where ``rank`` of ``world_size`` stands, without any group: what planners, dry runs and offline tools ask.

        dp is what the other sizes leave; ``etp``, the tensor parallelism of experts, is ``tp`` unless given. The
        layout must have been checked (:func:`megaforge.config.check_layout.check_layout`).
        """
        etp = tp if etp is None else etp
        axes = {"world": Axis("world", world_size, rank)}
        for names, sizes in _meshes(world_size, tp, cp, pp, ep, etp).items():
            rest = rank
            for name, size in zip(reversed(names), reversed(sizes), strict=True):
                rest, coordinate = divmod(rest, size)
                axes[name] = Axis(name, size, coordinate)
        return cls._of_axes(torch.device(device), axes)

    @classmethod
    def create(
        cls,
        *,
        tp: int = 1,
        cp: int = 1,
        pp: int = 1,
        ep: int = 1,
        etp: int | None = None,
        device: torch.device | str = "cpu",
        timeout: datetime.timedelta | None = None,
    ) -> ParallelContext:
        """:meth:`of_rank` for this rank of the initialised default process group, with the groups to communicate in.

        Collective. An axis of size one has no group, and one of the whole world has the default group.

        Args:
            timeout: after which a collective that does not end aborts; None: torch's own.
        """
        device = torch.device(device)
        if not dist.is_initialized():
            return cls.single(device)
        world_size = dist.get_world_size()
        ctx = cls.of_rank(dist.get_rank(), world_size, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, device=device)
        if world_size == 1:
            return ctx
        axes = {"world": dataclasses.replace(ctx.world, group=dist.group.WORLD)}
        for names, sizes in _meshes(world_size, tp, cp, pp, ep, ctx.etp.size).items():
            grid = torch.arange(world_size).view(sizes)
            for dim, (name, size) in enumerate(zip(names, sizes, strict=True)):
                if size > 1 and name not in axes:
                    members = grid.movedim(dim, -1).reshape(-1, size).tolist()
                    axes[name] = dataclasses.replace(ctx.axis(name), group=_make_group(members, timeout))
        groups = (axes[name].group for name in AXES if name in axes)
        connect((group for group in groups if group is not None), device)
        control = make_control_group(timeout)
        # A rank that ends at once (a flag that it refuses) must not close its connections while another still makes its
        # own: that one would report a lost peer in place of the refusal.
        dist.all_reduce(torch.zeros(1), group=control)
        return cls._of_axes(device, {name: axes.get(name, ctx.axis(name)) for name in AXES}, control)

    def axis(self, name: str) -> Axis:
        """The axis called ``name``, one of :data:`AXES`."""
        axis: Axis = getattr(self, name)
        return axis

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank speaks for the run (prints, writes metrics)."""
        return self.world.rank == 0


def _make_group(members: list[list[int]], timeout: datetime.timedelta | None) -> ProcessGroup:
    """This rank's group among ``members``, the ranks of each group of an axis: every rank is in one of them.

    Every rank makes its groups axis by axis, so that no two wait for each other.
    """
    world = dist.group.WORLD
    assert world is not None
    if len(members) == 1:
        return world
    if world.bound_device_id is not None:  # NCCL splits all groups of an axis off the world's in one call
        split = dist.split_group(split_ranks=members, timeout=timeout)
        assert split is not None
        return split
    rank = dist.get_rank()
    if dist.get_backend() == "mpi":  # where all ranks must make all groups
        made = [dist.new_group(ranks, timeout=timeout) for ranks in members]
        return next(group for group, ranks in zip(made, members, strict=True) if rank in ranks)
    own = next(ranks for ranks in members if rank in ranks)
    return dist.new_group(own, timeout=timeout, use_local_synchronization=True)


def make_control_group(timeout: datetime.timedelta | None) -> ProcessGroup:
    """A group of all ranks for what is in host memory. Collective."""
    there = dist.get_backend() in ("gloo", "mpi", "fake")  # the last is a dry run's
    return dist.new_group(timeout=timeout, backend=None if there else "gloo")


def _meshes(world_size: int, tp: int, cp: int, pp: int, ep: int, etp: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The three foldings of the ranks: names and sizes of their axes, slowest first."""
    replicas = world_size // (tp * pp)
    return {
        DENSE_MESH: (pp, replicas // cp, cp, tp),
        EXPERT_MESH: (pp, world_size // (pp * ep * etp), ep, etp),
        REPLICA_MESH: (pp, replicas, tp),
    }
