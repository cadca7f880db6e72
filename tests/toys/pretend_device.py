"""A toy device: the CPU, as a package for an accelerator would tell the engine of one. It counts what it is asked."""

from __future__ import annotations

from collections import Counter

import torch

from megaforge.device import DeviceKind
from megaforge.registry import DEVICES

ASKED: Counter[str] = Counter()


def _note(name: str) -> None:
    ASKED[name] += 1


def _peak(device: torch.device) -> int:
    _note("peak")
    return 123_000_000


def pretend() -> DeviceKind:
    """Two devices of a type that torch knows."""
    return DeviceKind(
        "cpu",
        "gloo",
        count=lambda: 2,
        select=lambda device: _note(f"select {device.index}"),
        synchronize=lambda device: _note("synchronize"),
        peak_bytes=_peak,
        memory=lambda device: (10**9, 2 * 10**9),
        random_state=lambda device: torch.tensor([7], dtype=torch.uint8),
        set_random_state=lambda state, device: _note(f"random {state.item()}"),
    )


DEVICES.register("pretend", pretend)
