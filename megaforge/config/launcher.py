"""Which rank this process is, however it was started: read from the launcher's variables, without torch."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from megaforge.errors import UserError

# SLURM's numbers of steps that run no task of ours: an allocation's interactive shell, a batch script, its containers.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

# The logger of what people see anyway, for files (:mod:`megaforge.monitor.log`).
SAID = "megaforge.said"


@dataclass(frozen=True)
class Launch:
    """How this process was started."""

    launcher: str = "python"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class _Launcher:
    """A launcher and its variables; the first of ``locals`` that is set has the rank on this machine."""

    name: str
    rank: str
    size: str
    locals: tuple[str, ...]


# In the order they are tried: torchrun inside an sbatch script sets both its own variables and SLURM's, and its own are
# the right ones; so are those of an mpirun inside one.
_TORCHRUN = _Launcher("torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",))
_SRUN = _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",))
_MPI = (
    _Launcher("OpenMPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    _Launcher("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_RANK",)),
    _Launcher("MPICH", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID")),
)
MPI_LAUNCHERS = tuple(launcher.name for launcher in _MPI)


def discover_launch(env: Mapping[str, str] | None = None) -> Launch:
    """Rank, world size and local rank as the launcher's environment has them; a plain process is rank 0 of 1.

    Raises:
        UserError: a launcher's variables are empty, half set or contradict each other.
    """
    env = os.environ if env is None else env
    srun = _srun(env)
    for launcher in (_TORCHRUN, *_MPI):
        found = _read(launcher, env)
        if found is None:
            continue
        # srun --mpi=pmi2 sets MPICH's variables beside its own, and only its own have the local rank.
        if launcher.name == "MPICH" and srun and (srun.rank, srun.world_size) == (found.rank, found.world_size):
            return srun
        return found
    return srun or Launch()


@functools.cache
def this_launch() -> Launch:
    """:func:`discover_launch` of this process, read once."""
    return discover_launch()


def print_rank_0(message: str) -> None:
    """Prints ``message`` to standard error on rank 0: the one place where a fallback speaks up."""
    logging.getLogger(SAID).info("%s", message)
    if this_launch().rank == 0:
        print(message, file=sys.stderr, flush=True)


def check_address(launch: Launch, env: Mapping[str, str] | None = None) -> None:
    """Checks that ranks which no MPI can introduce to each other know where to meet.

    Raises:
        UserError: there are several, and MASTER_ADDR or MASTER_PORT is missing, and not to be had from SLURM.
    """
    env = os.environ if env is None else env
    known = {**(srun_address(env) if launch.launcher == "srun" else {}), **env}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not known.get(name)]
    if launch.world_size == 1 or not missing or launch.launcher in MPI_LAUNCHERS:
        return
    if launch.launcher == "srun":
        raise UserError(
            f"started by srun without {' and '.join(missing)}, and no SLURM_STEP_NODELIST names the nodes; export them "
            "in the sbatch script (see run_scripts/slurm) or start torchrun with srun"
        )
    raise UserError(
        f"RANK={launch.rank} WORLD_SIZE={launch.world_size} without {' and '.join(missing)}: the ranks have no address "
        "to meet at; start them with torchrun, export both variables, or unset RANK and WORLD_SIZE for one process"
    )


def srun_address(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where ranks that srun started meet, as MASTER_ADDR and MASTER_PORT, of what the environment does not say itself:
    the first node of the step, which has rank 0, and a port of job and step. Empty where SLURM names no node."""
    env = os.environ if env is None else env
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    numbers = [env.get(f"SLURM_{name}_ID", "0") for name in ("JOB", "STEP")]
    if not nodes or not all(number.isdigit() for number in numbers):
        return {}
    found = {"MASTER_ADDR": first_node(nodes), "MASTER_PORT": str(20000 + sum(map(int, numbers)) % 12000)}
    return {name: value for name, value in found.items() if not env.get(name)}


def first_node(nodes: str) -> str:
    """The first of SLURM's list, such as ``gpu[007-009,12],login1``."""
    first, bracket, rest = nodes.partition("[")
    if "," in first or not bracket:
        return nodes.partition(",")[0]
    numbers, _, after = rest.partition("]")
    tail = after.partition(",")[0]
    return first + numbers.partition(",")[0].partition("-")[0] + (first_node(tail) if tail else "")


def end_with_torchrun(env: Mapping[str, str] | None = None) -> None:
    """Asks the kernel to send this process SIGTERM when its torchrun is gone. torchrun gives ranks sessions of their
    own, so that without it they would outlive one that was killed, and keep their devices and ``--save``.

    Does nothing where torchrun did not start it, or the system is not Linux.
    """
    env = os.environ if env is None else env
    if "TORCHELASTIC_RUN_ID" not in env or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


def restarts_may_hang(env: Mapping[str, str] | None = None) -> str | None:
    """A warning where torchrun is to start ranks again, and these could read where those before them were: it keeps one
    store for all its rounds (torch 2.13, dynamic_rendezvous.py)."""
    env = os.environ if env is None else env
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if not restarts.isdigit() or int(restarts) == 0 or env.get(_OWN_STORE) == "1":
        return None
    return (
        f"torchrun --max-restarts {restarts}: ranks that it starts again may hang, as they can read the addresses of "
        f"those before them; export {_OWN_STORE}=1 before torchrun (the scripts of run_scripts do)"
    )


def _srun(env: Mapping[str, str]) -> Launch | None:
    """The task that srun started; the shells of salloc and sbatch have some of its variables and are not tasks."""
    step = env.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return None
    if _SRUN.size not in env and "SLURM_NTASKS" in env:
        env = {**env, _SRUN.size: env["SLURM_NTASKS"]}
    return _read(_SRUN, env)


def _read(launcher: _Launcher, env: Mapping[str, str]) -> Launch | None:
    """What ``launcher`` says; None where it did not start us."""
    given = [name for name in (launcher.rank, launcher.size) if name in env]
    if not given:
        return None
    rank, size = _number(launcher, launcher.rank, env), _number(launcher, launcher.size, env)
    if rank >= size:
        raise UserError(
            f"{launcher.rank}={rank} with {launcher.size}={size}: ranks count from 0 to {size - 1}; "
            + _remedy(launcher)
        )
    local = next((name for name in launcher.locals if name in env), None)
    # Without a local rank all ranks are taken to share this machine; resolve_device refuses one without a GPU.
    return Launch(launcher.name, rank, size, rank if local is None else _number(launcher, local, env))


def _number(launcher: _Launcher, name: str, env: Mapping[str, str]) -> int:
    text = env.get(name)
    if text is not None and text.strip().isdigit():
        return int(text)
    others = [f"{other}={env[other]}" for other in (launcher.rank, launcher.size) if other in env and other != name]
    beside = f" beside {', '.join(others)}" if others else ""
    state = "is missing" if text is None else "is empty" if not text.strip() else f"is '{text}', not a number"
    raise UserError(f"the variable {name} {state}{beside}; {_remedy(launcher)}")


def _remedy(launcher: _Launcher) -> str:
    names = " ".join((launcher.rank, launcher.size, *launcher.locals))
    starter = {"torchrun": "torchrun", "srun": "srun"}.get(launcher.name, "mpirun")
    return f"start the ranks with {starter}, which sets all of them, or for one process: unset {names}"
