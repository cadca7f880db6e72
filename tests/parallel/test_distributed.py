"""Where a rank stands among the others, and a real mpirun where an MPI is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch.distributed as dist

from megaforge.errors import UserError
from megaforge.parallel.context import AXES, ParallelContext
from megaforge.parallel.distributed import check_backend


def test_a_torch_without_a_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_mpi_available", lambda: False)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="--distributed-backend gloo"):
        check_backend("mpi")
    with pytest.raises(UserError, match="built without NCCL; use --distributed-backend gloo"):
        check_backend("nccl")
    check_backend("gloo")


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
