"""What each launcher's variables say, and what is said where they make no sense."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megaforge.config import launcher
from megaforge.config.launcher import (
    Launch,
    check_address,
    discover_launch,
    first_node,
    print_rank_0,
    restarts_may_hang,
    srun_address,
)
from megaforge.errors import UserError

STEP = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
STEP |= {"SLURM_STEP_NUM_TASKS": "8"}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "8"}
SHELL = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch("torchrun", 3, 8, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Launch("torchrun", 1, 2, 1)),  # by hand, on one machine
        # torchrun started by srun: its own variables win
        (STEP | {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "2"}, Launch("torchrun", 5, 16, 2)),
        (STEP, Launch("srun", 3, 8, 1)),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"}, Launch("srun", 3, 8, 1)),
        # a step smaller than the allocation
        (STEP | {"SLURM_STEP_NUM_TASKS": "4"}, Launch("srun", 3, 4, 1)),
        (STEP | PMI, Launch("srun", 3, 8, 1)),  # srun --mpi=pmi2
        (STEP | {"PMIX_RANK": "3"}, Launch("srun", 3, 8, 1)),  # srun --mpi=pmix
        # Hydra inside an allocation starts its proxies with srun: its own variables are the ranks'
        (STEP | {"PMI_RANK": "9", "PMI_SIZE": "32", "MPI_LOCALRANKID": "2"}, Launch("MPICH", 9, 32, 2)),
        # shells of sbatch and salloc are not tasks
        (SHELL, Launch()),
        (SHELL | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        (SHELL | {"SLURM_STEP_ID": "4294967291"}, Launch()),
        (
            {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Launch("OpenMPI", 5, 8, 1),
        ),
        (
            {"MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1"},
            Launch("MVAPICH", 5, 8, 1),
        ),
        (PMI | {"MPI_LOCALRANKID": "1"}, Launch("MPICH", 3, 8, 1)),
        (PMI | {"PMI_LOCAL_RANK": "1", "PALS_RANKID": "3"}, Launch("MPICH", 3, 8, 1)),  # Cray PALS
        (PMI | {"PALS_LOCAL_RANKID": "1", "PALS_RANKID": "3"}, Launch("MPICH", 3, 8, 1)),
    ],
)
def test_rank_size_and_local_rank(env: dict[str, str], expected: Launch) -> None:
    assert discover_launch(env) == expected


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "", "WORLD_SIZE": ""}, ("RANK is empty", "unset RANK WORLD_SIZE LOCAL_RANK")),
        ({"RANK": "1"}, ("WORLD_SIZE is missing", "RANK=1")),
        ({"WORLD_SIZE": "2"}, ("RANK is missing", "WORLD_SIZE=2")),
        ({"RANK": "1", "WORLD_SIZE": "two"}, ("WORLD_SIZE is 'two'",)),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ("RANK is '-1'",)),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ("RANK=2", "WORLD_SIZE=2", "0 to 1")),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, ("LOCAL_RANK is empty",)),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ("OMPI_COMM_WORLD_SIZE is missing", "mpirun")),
        (STEP | {"SLURM_PROCID": ""}, ("SLURM_PROCID is empty", "srun")),
    ],
)
def test_variables_that_make_no_sense_are_named(env: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        discover_launch(env)
    assert all(word in str(error.value) for word in words), error.value


def test_several_ranks_need_an_address() -> None:
    where = {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    for name, words in (("torchrun", "RANK=0 WORLD_SIZE=2 without MASTER_ADDR"), ("srun", "started by srun")):
        with pytest.raises(UserError, match=words):
            check_address(Launch(name, 0, 2, 0), {"MASTER_PORT": "1234"})
        with pytest.raises(UserError, match="MASTER_PORT"):
            check_address(Launch(name, 0, 2, 0), where | {"MASTER_PORT": ""})
        check_address(Launch(name, 0, 2, 0), where)
        check_address(Launch(name, 0, 1, 0), {})
    check_address(Launch("OpenMPI", 0, 2, 0), {})  # mpi4py tells them


def test_srun_says_where_its_ranks_meet() -> None:
    lists = {
        "vm": "vm",
        "a1,b2": "a1",
        "gpu[007-009,12],login1": "gpu007",
        "r[3,5]n[1-2]": "r3n1",
        "x-[10-12].site": "x-10.site",
    }
    assert {nodes: first_node(nodes) for nodes in lists} == lists
    job = {"SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "1"}
    assert srun_address(job) == {"MASTER_ADDR": "gpu07", "MASTER_PORT": "20042"}
    assert srun_address(job | {"SLURM_JOB_ID": "41000", "MASTER_ADDR": "here"}) == {"MASTER_PORT": "25001"}
    assert srun_address({}) == {} == srun_address(job | {"SLURM_JOB_ID": ""})
    check_address(Launch("srun", 0, 2, 0), job)
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT: the ranks have no address"):
        check_address(Launch("torchrun", 0, 2, 0), job)


def test_notices_read_the_environment_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launcher.this_launch.cache_clear()
    reads = []
    monkeypatch.setattr(launcher, "discover_launch", lambda: reads.append(1) or Launch())
    print_rank_0("one")
    print_rank_0("two")
    launcher.this_launch.cache_clear()
    assert capsys.readouterr().err == "one\ntwo\n" and len(reads) == 1 and os.environ


def test_restarts_that_may_hang_are_told_of() -> None:
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    said = restarts_may_hang({"TORCHELASTIC_MAX_RESTARTS": "3"})
    assert said is not None and "--max-restarts 3" in said and "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said
    for quiet in ({}, {"TORCHELASTIC_MAX_RESTARTS": "0"}, {"TORCHELASTIC_MAX_RESTARTS": "3", **own}):
        assert restarts_may_hang(quiet) is None


RANK = """
import os, signal, sys, time
from megaforge.config.launcher import end_with_torchrun
signal.signal(signal.SIGTERM, lambda number, frame: (os.write(1, b"asked to end\\n"), os._exit(0)))
end_with_torchrun()
print("ready", flush=True)
time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent is gone")
def test_a_rank_does_not_outlive_its_torchrun() -> None:
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", LAUNCHER, RANK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.readline() == "asked to end\n"
