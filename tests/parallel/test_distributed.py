"""Where a rank stands among the others, and a real mpirun where an MPI is installed."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megaforge.errors import UserError
from megaforge.parallel import context
from megaforge.parallel.agree import exchange, from_first_rank
from megaforge.parallel.context import AXES, ParallelContext
from megaforge.parallel.distributed import check_backend, connect, initialize
from megaforge.verification.dry_run import _fake_ranks


def test_a_torch_without_a_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_mpi_available", lambda: False)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="--distributed-backend gloo"):
        check_backend("mpi")
    with pytest.raises(UserError, match="built without NCCL; use --distributed-backend gloo"):
        check_backend("nccl")
    check_backend("gloo")


@pytest.mark.parametrize(
    ("backend", "device", "bound"),
    [
        ("auto", "cuda:3", {"device_id": torch.device("cuda", 3)}),
        ("nccl", "cuda:0", {"device_id": torch.device("cuda", 0)}),
        ("auto", "cpu", {}),
        ("gloo", "cuda:0", {}),  # gloo binds no device
    ],
)
def test_nccl_is_bound_to_its_device(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, bound: dict[str, object]
) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"} | address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    monkeypatch.setattr("megaforge.parallel.distributed.meet", lambda *where: None)
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: calls.append({"backend": backend} | given))
    initialize(torch.device(device), backend, 2.0)
    (call,) = calls
    assert {name: call[name] for name in call if name == "device_id"} == bound
    assert call["backend"] == ("gloo" if backend == "gloo" or device == "cpu" else "nccl")


def test_every_group_that_nccl_serves_is_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {"world": "nccl", "pp": "nccl", "control": "gloo", "both": "cpu:gloo,cuda:nccl"}
    used: list[tuple[str, int]] = []
    monkeypatch.setattr(dist, "get_backend", lambda group: backends[group])
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: used.append((group, tensor.numel())))
    connect(backends, torch.device("cpu"))  # type: ignore[arg-type]
    assert used == [("world", 1), ("pp", 1), ("both", 1)]


def connected_groups() -> list[str]:
    """The axes whose groups ``create`` connects on this rank, in its order."""
    found: list[object] = []
    original = context.connect
    context.connect = lambda groups, device: found.extend(groups)  # type: ignore[assignment]
    try:
        ctx = ParallelContext.create(tp=2, ep=2, etp=1)
    finally:
        context.connect = original
    groups = {id(ctx.axis(name).group): name for name in AXES if ctx.axis(name).group is not None}
    return [groups[id(group)] for group in found]


def test_all_axes_are_connected_in_one_order(ranks) -> None:
    assert ranks.run(4, connected_groups) == [["tp", "dp", "ep", "edp", "dp_cp", "world"]] * 4


def slow_first_rank(mark: str) -> bool:
    """Whether rank 0, which is late with its last group, has made it when ``create`` is over on this rank."""
    original = context.make_control_group

    def late(timeout: datetime.timedelta | None) -> object:
        group = original(timeout)
        time.sleep(0.3)
        Path(mark).touch()
        return group

    if dist.get_rank() == 0:
        context.make_control_group = late  # type: ignore[assignment]
    try:
        ParallelContext.create(tp=2)
    finally:
        context.make_control_group = original
    return Path(mark).exists()


def test_no_rank_goes_on_while_another_makes_its_groups(ranks, tmp_path: Path) -> None:
    """One that ended at once would close its connections, and the other would report a lost peer."""
    assert ranks.run(2, slow_first_rank, str(tmp_path / "made")) == [True, True]


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
        [mpirun, "-n", "2", sys.executable, "-c", MPI_PROGRAM], capture_output=True, text=True, timeout=300
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


def test_a_rank_makes_only_the_groups_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand ranks have 576 groups beside the world's two; a rank makes none of size one, and none twice."""
    made: list[tuple[int, ...]] = []
    real = dist.new_group

    def counting(ranks: list[int] | None = None, **how: object) -> object:
        made.append(tuple(range(1024) if ranks is None else ranks))
        return real(ranks, **how)

    monkeypatch.setattr(dist, "new_group", counting)
    everywhere = set()
    for rank in range(1024):
        with _fake_ranks(rank, 1024):
            ctx = ParallelContext.create(tp=8, pp=8, ep=8, etp=1)
        assert len(made) == 7 and all(rank in ranks for ranks in made)
        assert [axis.group is None for axis in (ctx.cp, ctx.etp)] == [True, True]
        # Axes may have the same members: tp and ep here, or dp, dp_cp and edp.
        everywhere.update((place, ranks) for place, ranks in enumerate(made))
        made.clear()
    assert len(everywhere) == 576 + 1


def test_nccl_splits_each_axis_off_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[list[list[int]]] = []
    monkeypatch.setattr(dist, "split_group", lambda split_ranks, timeout: splits.append(split_ranks) or 1)
    monkeypatch.setattr(context, "connect", lambda groups, device: None)
    with _fake_ranks(5, 8):
        dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
        ParallelContext.create(tp=2, pp=2)
    assert splits == [
        [[0, 4], [1, 5], [2, 6], [3, 7]],
        [[0, 2], [1, 3], [4, 6], [5, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2], [1, 3], [4, 6], [5, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2], [1, 3], [4, 6], [5, 7]],
    ]


def timeouts_and_agreements() -> tuple[list[float], list[int], int]:
    """Minutes that groups wait, and what ranks agree on, by themselves in the control group."""
    ctx = ParallelContext.create(tp=2, timeout=datetime.timedelta(minutes=7))
    assert ctx.control is not ctx.world.group and dist.get_backend(ctx.control) == "gloo"
    backends = [group._get_backend(torch.device("cpu")) for group in (ctx.tp.group, ctx.dp.group, ctx.control)]
    minutes = [backend.options._timeout.total_seconds() / 60 for backend in backends]
    with (
        patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as gather,
        patch.object(dist, "broadcast_object_list", wraps=dist.broadcast_object_list) as broadcast,
    ):
        agreed = exchange(ctx, 10 * ctx.world.rank), from_first_rank(ctx, lambda: 7 + ctx.world.rank)
    assert all(call.call_args.kwargs["group"] is ctx.control for call in (gather, broadcast))
    return minutes, *agreed


def test_groups_wait_as_long_as_asked_and_ranks_agree_in_the_control_group(ranks) -> None:
    assert ranks.run(4, timeouts_and_agreements) == [([7.0, 7.0, 7.0], [0, 10, 20, 30], 7)] * 4
