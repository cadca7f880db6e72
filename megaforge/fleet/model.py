"""One model of a fleet: its command line, what has become of it, and what it gave."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import megaforge
from megaforge.config.cli import ParsedConfig, format_config, parse_config
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.fleet.processes import Job
from megaforge.fleet.recipe import ModelSettings
from megaforge.monitor.runs import METRICS_FILE, Run
from megaforge.resilience.leaving import COMPLETED

REPO = Path(megaforge.__file__).resolve().parents[1]
CONSOLE_FILE, CONFIG_FILE, STOP_FILE = "console.log", "config.yaml", "stop"
_AS_MEGATRON = ("pretrain_gpt.py", "pretrain_hybrid.py")
_TAIL = 1 << 16  # bytes of the console in which a reason is looked for
# What a process says, or torchrun of it, when it was out of memory or the kernel ended it for that.
_OUT_OF_MEMORY = ("(SIGKILL)", "exitcode: -9", "exitcode  : -9", "out of memory", "allocate memory", "MemoryError")
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class State(StrEnum):
    """What has become of a model in this fleet."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"  # asked to end; it can go on
    FAILED = "failed"


class Model:
    """Attributes:
    settings: what the fleet's file says of it.
    directory: where it saves.
    state, reason: what has become of it, and why.
    attempts: how often it was started.
    retried: how many of these were because it had failed.
    seconds: that its attempts took.
    peak_memory: the most bytes that it has held.
    reached: the iteration at which its last attempt ended.
    job: its processes while it runs.
    run: what its files tell.
    train_iters: steps that it is to make, where its flags say so.
    """

    def __init__(self, settings: ModelSettings, output: Path) -> None:
        self.settings, self.directory = settings, settings.directory(output)
        self.state, self.reason = State.WAITING, ""
        self.attempts, self.retried, self.seconds, self.peak_memory = 0, 0, 0.0, 0.0
        self.reached = 0
        self.job: Job | None = None
        self.began = 0.0
        self.run = Run(settings.name, self.directory)
        self.train_iters: int | None = None

    @property
    def name(self) -> str:
        return self.settings.name

    def words(self) -> list[str]:
        """The flags of its command line."""
        place = str(self.directory.absolute())
        own = ("--save", place, "--load", place, "--metrics-file", os.path.join(place, METRICS_FILE))
        return [*self.settings.words, *own]

    def line(self) -> list[str]:
        """Its whole command line."""
        script = str(REPO / self.settings.script)
        ranks = self.settings.ranks
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        return [sys.executable, *(torchrun if ranks > 1 else ()), script, *self.words()]

    def check(self) -> ParsedConfig:
        """Reads its flags as its process will.

        Raises:
            UserError: naming the model.
        """
        name = self.settings.script
        if not (REPO / name).is_file():
            raise UserError(f"{self.name}: {REPO / name} is not there; run the fleet from a clone of the repository")
        defaults: Mapping[str, Any] = _finetune_defaults() if name == "finetune_cdrmix.py" else {}
        said = io.StringIO()  # the process says it again
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                parsed = parse_config(self.words(), prog=name, as_megatron=name in _AS_MEGATRON, defaults=defaults)
        except UserError as error:
            raise UserError(f"{self.settings.where}: {self.name}: {error}") from error
        steps = parsed.config.training.train_iters
        self.train_iters = steps if isinstance(steps, int) else None
        return parsed

    def prepare(self) -> None:
        """Makes its directory, with its configuration and its command.

        Raises:
            UserError: its flags cannot be.
            OSError: it cannot be written.
        """
        parsed = self.check()
        self.directory.mkdir(parents=True, exist_ok=True)
        text = f"# {shlex.join(self.line())}\n{format_config(parsed)}\n"
        with replacing(self.directory / CONFIG_FILE) as part:
            part.write_text(text, encoding="utf-8")

    @property
    def console(self) -> Path:
        return self.directory / CONSOLE_FILE

    def environment(self, threads: int) -> dict[str, str]:
        """Of its processes: so many threads a rank, and nothing of a launcher that started the fleet."""
        kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
        kept = {name: value for name, value in kept.items() if not name.startswith(("TORCHELASTIC_", "SLURM_STEP"))}
        return {**kept, "OMP_NUM_THREADS": str(threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def tail(self) -> str:
        """The end of what its newest attempt has said."""
        with contextlib.suppress(OSError), self.console.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode(errors="replace").rpartition(ATTEMPT)[2]
        return ""

    def ended(self, status: int) -> None:
        """Says what has become of the attempt that left with ``status``."""
        self.run.poll()
        self.measure()
        text = self.tail()
        errors = [line for line in text.splitlines() if line.startswith("error")]
        if status == 0:
            complete = (self.directory / COMPLETED).is_file()
            self.state = State.COMPLETED if complete else State.STOPPED
            self.reason = self.run.reason
        else:
            self.state = State.FAILED
            said = errors[-1] if errors else self.run.reason or next(reversed(text.split("\n")[:-1]), "")
            self.reason = f"{_of_status(status)}: {said}" if said else _of_status(status)

    def measure(self) -> None:
        """Takes in how much memory it has held, as far as was seen and as its own numbers say."""
        said = self.run.steps.last().get("peak_memory_bytes", 0.0) * self.settings.ranks
        seen = 0.0 if self.job is None else self.job.peak_memory()
        self.peak_memory = max(self.peak_memory, seen, said)

    def ran_out_of_memory(self, status: int) -> bool:
        """Whether the kernel, or the lack of memory, ended the attempt that left with ``status``."""
        return status in (-9, 137) or (status not in (0, 2) and any(words in self.tail() for words in _OUT_OF_MEMORY))

    def can_be_tried_again(self, status: int) -> bool:
        """Whether the same line may do better: not after a mistake in it, or a full disk."""
        return self.state is State.FAILED and status != 2


ATTEMPT = "=== attempt "  # begins a line of the console


def _of_status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def _finetune_defaults() -> Mapping[str, Any]:
    import runpy

    found = runpy.run_path(str(REPO / "finetune_cdrmix.py"))["DEFAULTS"]
    return dict(found)
