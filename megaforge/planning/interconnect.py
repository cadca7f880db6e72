"""What a host says of its network and of the links between its devices: files of the kernel, and drivers' tools."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_SECONDS = 60.0


def fabric_ports(root: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """InfiniBand and RoCE ports that are up: ``mlx5_0/1`` -> ``400 Gb/sec (4X NDR)``."""
    found = {}
    for rate in sorted(root.glob("*/ports/*/rate")):
        with suppress(OSError):
            if "ACTIVE" in (rate.parent / "state").read_text():
                found[f"{rate.parents[2].name}/{rate.parent.name}"] = rate.read_text().strip()
    return found


def network_speeds(root: Path = Path("/sys/class/net")) -> dict[str, float]:
    """Network interfaces that tell their speed: name -> bit/s. Virtual ones mostly do not."""
    found = {}
    for speed in sorted(root.glob("*/speed")):
        with suppress(OSError, ValueError):
            if (megabits := int(speed.read_text())) > 0:
                found[speed.parent.name] = megabits * 1e6
    return found


def device_links(
    tools: Sequence[Sequence[str]] = (("nvidia-smi", "topo", "-m"), ("rocm-smi", "--showtopotype")),
) -> str:
    """How the host's accelerators are connected: ``NV18``, ``XGMI``, ``PIX`` ... as the driver's tool names the closest
    link between two of them; an empty text where no tool tells."""
    for command in tools:
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        for link in (
            r"\bNV\d+\b",
            r"\bXGMI\b",
            r"\bPIX\b",
            r"\bPXB\b",
            r"\bPHB\b",
            r"\bNODE\b",
            r"\bSYS\b",
            r"\bPCIE\b",
        ):
            rows = [line for line in told.splitlines() if re.match(r"\s*(\x1b\[\d+m)*GPU\d", line)]
            if found := re.search(link, "\n".join(rows)):
                return found[0]
    return ""
