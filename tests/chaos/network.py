"""Two nodes on one machine, each in a network namespace of its own, and the line between them, which can be cut."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

DEVICE = "chaos0"  # of each node


class Network:
    """Makes both; :meth:`remove` takes them away.

    Raises:
        OSError: this user or machine cannot.
    """

    def __init__(self) -> None:
        self._names = [f"chaos_{os.getpid()}_{node}" for node in "ab"]
        self.is_cut = False
        if os.geteuid() != 0:
            raise PermissionError("network namespaces need root")
        try:
            for name in self._names:
                _ip("netns", "add", name)
            first, second = self._names
            peer = ("peer", "name", DEVICE, "netns", second)
            _ip("link", "add", DEVICE, "netns", first, "type", "veth", *peer)
            for node, name in enumerate(self._names):
                _ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", DEVICE)
                for device in (DEVICE, "lo"):
                    _ip("-n", name, "link", "set", device, "up")
        except OSError:
            self.remove()
            raise

    @staticmethod
    def address(node: int) -> str:
        """Of one of the two nodes."""
        return f"10.231.7.{node + 1}"

    def inside(self, node: int) -> list[str]:
        """What stands before a command that runs there."""
        return ["ip", "netns", "exec", self._names[node]]

    def cut(self) -> None:
        """From now on nothing passes."""
        _ip("-n", self._names[1], "link", "set", DEVICE, "down")
        self.is_cut = True

    def mend(self) -> None:
        """It passes again."""
        _ip("-n", self._names[1], "link", "set", DEVICE, "up")
        self.is_cut = False

    def remove(self) -> None:
        """Takes away what there is."""
        for name in self._names:
            if Path(f"/run/netns/{name}").exists():
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
