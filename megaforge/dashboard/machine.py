"""How busy and how full this machine is, or the part of it that a container has."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from megaforge.errors import require
from megaforge.fleet.machine import look

_GPU_SECONDS = 5.0  # between two questions to nvidia-smi, which takes a while to answer
_ASK_GPUS = (
    "nvidia-smi",
    "--query-gpu=name,utilization.gpu,memory.used,memory.total",
    "--format=csv,noheader,nounits",
)


class MachineMeter:
    """Measures processors, memory, the disk of ``directory``, and GPUs.

    Raises:
        UserError: psutil is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        require("psutil", extra="dashboard", purpose="the panel of resources")
        look()  # the next load is that since now
        self._gpus: list[dict[str, Any]] | None = []
        self._asked = float("-inf")

    def __call__(self) -> dict[str, Any]:
        """Shares from 0 to 1, sizes in bytes; null where it cannot be known."""
        now = look()
        return {
            "host": socket.gethostname(),
            "cpus": now.cpus,
            "cpu_share": round(now.load, 3),
            "memory_bytes": round(now.memory - now.free_memory),
            "memory_total_bytes": round(now.memory),
            **self._disk(),
            "gpus": self._gpus_now(),
            "time": round(time.time(), 1),
        }

    def _disk(self) -> dict[str, int | None]:
        try:
            usage = shutil.disk_usage(self._directory)
        except OSError:
            return {"disk_bytes": None, "disk_total_bytes": None}
        return {"disk_bytes": usage.used, "disk_total_bytes": usage.total}

    def _gpus_now(self) -> list[dict[str, Any]]:
        if self._gpus is not None and time.monotonic() - self._asked >= _GPU_SECONDS:
            self._gpus, self._asked = _ask_gpus(), time.monotonic()
        return self._gpus or []


def _ask_gpus() -> list[dict[str, Any]] | None:
    """What nvidia-smi says; None where there is no such program, which does not change."""
    try:
        done = subprocess.run(_ASK_GPUS, capture_output=True, text=True, timeout=4, check=True)
    except (FileNotFoundError, PermissionError):
        return None
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """The GPUs of a CSV of nvidia-smi: name, use in percent, memory used and in all in MiB; it writes ``[N/A]`` for
    what it does not know."""
    found = []
    for line in text.splitlines():
        name, *numbers = (part.strip() for part in line.rsplit(",", 3))
        if len(numbers) == 3:
            use, used, total = (float(number) if number.replace(".", "", 1).isdigit() else None for number in numbers)
            found.append(
                {
                    "name": name,
                    "used_share": None if use is None else use / 100,
                    "memory_bytes": None if used is None else int(used * 2**20),
                    "memory_total_bytes": None if total is None else int(total * 2**20),
                }
            )
    return found
