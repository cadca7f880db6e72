"""The job: its text, its line, its launches."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaforge.resilience.faults import VARIABLE
from tests.chaos.network import DEVICE, Network

REPO = Path(__file__).resolve().parents[2]
# By ranks: the layout of the job.
LAYOUTS = {
    1: (),
    2: ("--zero-stage", "1"),
    4: ("--tp", "2", "--zero-stage", "1"),
    8: ("--tp", "2", "--pp", "2", "--zero-stage", "1"),
}


@dataclass(frozen=True)
class Job:
    """One line of training.

    Attributes:
        home: folder of its checkpoints, metrics and logs.
        text: folder with text_text_document.* and tok.json.
        ranks: processes, a key of :data:`LAYOUTS`.
        iterations: steps of the whole run; a checkpoint every third, and
            a snapshot in memory after each, where there are two nodes.
        timeout: seconds after which a rank that waits for another gives up.
    """

    home: Path
    text: Path
    ranks: int
    iterations: int
    timeout: float

    @property
    def save(self) -> Path:
        return self.home / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.home / "metrics.jsonl"

    @property
    def node_ranks(self) -> int | None:
        """Ranks of each of two nodes; None where there is one."""
        return self.ranks // 2 if self.ranks > 1 else None

    @property
    def memory(self) -> Path:
        """Folder of the nodes' snapshots."""
        from megaforge.training.snapshots import snapshot_folder  # needs torch, which --help does not

        return snapshot_folder(str(self.home / "memory"), str(self.save))

    def flags(self, layout: Sequence[str]) -> list[str]:
        return [
            *("--config", "cdrmix-test", "--device", "cpu", "--train-iters", str(self.iterations)),
            *("--data-path", str(self.text / "text_text_document"), "--tokenizer-model", str(self.text / "tok.json")),
            *("--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--num-workers", "0"),
            *("--lr-decay-style", "constant", "--save-interval", "3", "--save", str(self.save)),
            *("--load", str(self.save), "--metrics-file", str(self.metrics)),
            *("--distributed-timeout-minutes", f"{self.timeout / 60:.4f}", *layout),
        ]

    def launch(
        self, port: int, *, restarts: int = 0, plan: Path | None = None, network: Network | None = None
    ) -> Launched:
        """Starts torchrun, in a ``network`` on each of its two nodes; what it prints goes to ``home/launch.log``."""
        memory: list[str] = []
        if self.node_ranks is not None:
            memory += ["--snapshot-interval", "1", "--snapshot-peers", "--snapshot-dir", str(self.home / "memory")]
            memory += ["--snapshot-ranks-per-node", str(self.node_ranks)]
        script = [str(REPO / "pretrain_cdrmix.py"), *self.flags(LAYOUTS[self.ranks]), *memory]
        launched = Launched([])
        for node in range(1 if network is None else 2):
            line = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", str(restarts)]
            line += ["--rdzv-backend", "c10d", "--rdzv-id", "chaos", "--shutdown-timeout", "2"]
            if network is None:
                line += ["--nnodes", "1", "--nproc-per-node", str(self.ranks), "--rdzv-endpoint", f"localhost:{port}"]
            else:
                line = [*network.inside(node), *line, "--nnodes", "2", "--nproc-per-node", str(self.node_ranks)]
                line += ["--rdzv-endpoint", f"{network.address(0)}:{port}", "--local-addr", network.address(node)]
                line += ["--rdzv-conf", f"is_host={'true' if node == 0 else 'false'}"]
            launched.processes.append(self._start([*line, *script], "launch.log", plan, network))
        return launched

    def second(self) -> Launched:
        """The same line as one process: somebody has started the job twice."""
        other = dataclasses.replace(self, home=self.home / "second")
        flags = [*other.flags(()), "--save", str(self.save), "--load", str(self.save)]
        return Launched([self._start([sys.executable, str(REPO / "pretrain_cdrmix.py"), *flags], "second.log")])

    def _start(
        self, line: list[str], log: str, plan: Path | None = None, network: Network | None = None
    ) -> subprocess.Popen[bytes]:
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", VARIABLE)}
        kept |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(REPO)}
        if plan is not None:
            kept[VARIABLE] = str(plan)
        if network is not None:
            kept["GLOO_SOCKET_IFNAME"] = DEVICE
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self.home / log, "ab") as out:
            return subprocess.Popen(line, stdout=out, stderr=out, env=kept, start_new_session=True)


class Launched:
    """One launcher a node, and the ranks below them."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self.processes = processes

    def kill(self) -> None:
        """SIGKILL to all of them at once, as when nodes lose power."""
        for process in self.processes:
            for pid in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def status(self) -> int | None:
        """0 once all have ended well; another as soon as one has not: the others are killed; None: they run."""
        statuses = [process.poll() for process in self.processes]
        if bad := [status for status in statuses if status]:
            self.kill()
            return bad[0]
        return None if None in statuses else 0

    def wait(self, progress: Callable[[], object], patience: float, on_poll: Callable[[], None]) -> int | None:
        """Their status, or None where nothing that ``progress`` tells changes for ``patience`` seconds: they hang, and
        are killed."""
        last, since = progress(), time.monotonic()
        while (status := self.status()) is None:
            on_poll()
            now = progress()
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > patience:
                self.kill()
                return None
            time.sleep(0.05)
        return status


def descendants(pid: int) -> list[int]:
    """Process ids of children, their children and so on, as the kernel lists them."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
