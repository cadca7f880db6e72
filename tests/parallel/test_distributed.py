"""Rank discovery, whatever the launcher, and a real mpirun where an MPI is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch.distributed as dist

from megaforge.errors import UserError
from megaforge.parallel.context import AXES, ParallelContext
from megaforge.parallel.distributed import Launch, discover_launch, initialize


@pytest.mark.parametrize(
    "env,expected",
    [
        ({}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch("torchrun", 3, 8, 1)),
        # torchrun started by srun: its own variables win
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_ID": "0",
                "RANK": "5",
                "WORLD_SIZE": "16",
                "LOCAL_RANK": "5",
            },
            Launch("torchrun", 5, 16, 5),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
            Launch("srun", 5, 8, 1),
        ),
        # the batch script's own shell is no task
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Launch()),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Launch("OpenMPI", 1, 4, 1),
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, Launch("MPICH", 2, 4, 0)),
    ],
)
def test_rank_discovery(env: dict[str, str], expected: Launch) -> None:
    assert discover_launch(env) == expected


def test_srun_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        initialize("cpu", "gloo")


def test_missing_mpi_backend_names_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_mpi_available", lambda: False)
    with pytest.raises(UserError, match="--distributed-backend gloo"):
        initialize("cpu", "mpi")


def axis_ranks(tp: int) -> tuple[int, int, int]:
    ctx = ParallelContext.create(tp=tp)
    return ctx.world.rank, ctx.tp.rank, ctx.dp.rank


def test_tensor_parallel_neighbours_are_neighbouring_ranks(ranks) -> None:
    """Megatron-LM's default rank order."""
    assert ranks.run(4, axis_ranks, 2) == [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]


MPI_PROGRAM = """
import torch, torch.distributed as dist
from megaforge.parallel.distributed import initialize, shutdown
launch = initialize(torch.device("cpu"), "gloo", 1.0)
total = torch.tensor([float(launch.rank + 1)])
dist.all_reduce(total)
assert float(total) == 3.0 and launch.world_size == 2
print("sum", float(total))
shutdown()
"""


def test_ranks_meet_under_mpirun() -> None:
    pytest.importorskip("mpi4py", reason="needs the extra 'mpi'")
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("needs an mpirun on PATH")
    done = subprocess.run(
        [mpirun, "-n", "2", sys.executable, "-c", MPI_PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 3.0") == 2


def folded_ranks() -> dict[str, tuple[int, ...]]:
    ctx = ParallelContext.create(tp=2, ep=2, etp=1)
    members = {}
    for name in ("tp", "ep", "edp", "dp_cp"):
        axis = ctx.axis(name)
        ranks = [None] * axis.size
        dist.all_gather_object(ranks, ctx.world.rank, group=axis.group)
        members[name] = tuple(ranks)
    planned = ParallelContext.of_rank(ctx.world.rank, 4, tp=2, ep=2, etp=1)
    for name in AXES:
        assert (planned.axis(name).size, planned.axis(name).rank) == (ctx.axis(name).size, ctx.axis(name).rank)
    return members


def test_experts_fold_over_the_same_ranks(ranks) -> None:
    """tp 2 x dp 2 for dense layers is ep 2 x edp 2 for experts: expert-parallel neighbours are neighbouring ranks."""
    members = ranks.run(4, folded_ranks)
    assert members[0] == {"tp": (0, 1), "ep": (0, 1), "edp": (0, 2), "dp_cp": (0, 2)}
    assert members[3] == {"tp": (2, 3), "ep": (2, 3), "edp": (1, 3), "dp_cp": (1, 3)}
