"""The job: its text, its line, its launches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaforge.resilience.faults import VARIABLE

REPO = Path(__file__).resolve().parents[2]
MODULES = ("argparse", "ast", "bisect", "calendar", "csv", "dataclasses", "difflib", "heapq", "inspect", "textwrap")
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
        iterations: steps of the whole run; a checkpoint every second.
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

    def flags(self, layout: Sequence[str]) -> list[str]:
        return [
            *("--config", "cdrmix-test", "--device", "cpu", "--train-iters", str(self.iterations)),
            *("--data-path", str(self.text / "text_text_document"), "--tokenizer-model", str(self.text / "tok.json")),
            *("--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--num-workers", "0"),
            *("--lr-decay-style", "constant", "--save-interval", "2", "--save", str(self.save)),
            *("--load", str(self.save), "--metrics-file", str(self.metrics)),
            *("--distributed-timeout-minutes", f"{self.timeout / 60:.4f}", *layout),
        ]

    def launch(self, port: int, *, restarts: int = 0, plan: Path | None = None) -> Launched:
        """Starts torchrun; what it prints goes to ``home/launch.log``."""
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(self.ranks)]
        line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "chaos"]
        line += ["--max-restarts", str(restarts), "--shutdown-timeout", "2"]
        return self._start(
            [*line, str(REPO / "pretrain_cdrmix.py"), *self.flags(LAYOUTS[self.ranks])], "launch.log", plan
        )

    def second(self) -> Launched:
        """The same line as one process: somebody has started the job twice."""
        other = dataclasses.replace(self, home=self.home / "second")
        flags = [*other.flags(()), "--save", str(self.save), "--load", str(self.save)]
        return self._start([sys.executable, str(REPO / "pretrain_cdrmix.py"), *flags], "second.log", None)

    def _start(self, line: list[str], log: str, plan: Path | None) -> Launched:
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", VARIABLE)}
        kept |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(REPO)}
        if plan is not None:
            kept[VARIABLE] = str(plan)
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self.home / log, "ab") as out:
            return Launched(subprocess.Popen(line, stdout=out, stderr=out, env=kept, start_new_session=True))


class Launched:
    """A launcher and the ranks below it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def kill(self) -> None:
        """SIGKILL to all of them at once, as when a node loses power."""
        everyone = [*descendants(self.process.pid), self.process.pid]
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, progress: Callable[[], object], patience: float, on_poll: Callable[[], None]) -> int | None:
        """Its status, or None where nothing that ``progress`` tells changes for ``patience`` seconds: it hangs, and is
        killed."""
        last, since = progress(), time.monotonic()
        while (status := self.process.poll()) is None:
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


def write_text(folder: Path) -> None:
    """Some modules of the standard library as a dataset, made by the real tools."""
    if (folder / "text_text_document.idx").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for name in MODULES:
            file.write(json.dumps({"text": (library / f"{name}.py").read_text(encoding="utf-8")}) + "\n")
    source, tokenizer = str(folder / "text.jsonl"), str(folder / "tok.json")
    learn = ("--vocab-size", "600", "--output", tokenizer)
    write = ("--output-prefix", str(folder / "text"), "--tokenizer-model", tokenizer, "--append-eod")
    for tool, words in (("train_tokenizer", learn), ("preprocess_data", write)):
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        subprocess.run(
            [sys.executable, str(REPO / f"tools/{tool}.py"), "--input", source, *words], check=True, env=environment
        )
