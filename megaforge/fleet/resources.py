"""How many models may run at once, and why."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megaforge.errors import UserError
from megaforge.fleet.machine import GB, Machine, look

logger = logging.getLogger(__name__)

_HISTORY = 1000  # looks that are kept


@dataclass(frozen=True)
class Limits:
    """What a model needs, and when the machine is taken for busy; the defaults are source 002's."""

    memory_per_worker_gb: float = 8.0
    cpus_per_worker: float = 2.0
    high_load: float = 0.8
    min_free_memory_gb: float = 8.0


@dataclass(frozen=True)
class SystemResources:
    """A look at the machine. Memory in GB (1e9 bytes), usage in percent, as source 002 has them."""

    cpu_count: int
    memory_gb: float
    available_memory_gb: float
    cpu_usage_percent: float
    recommended_workers: int


class ResourceManager:
    """Says how many models may train at once.

    Attributes:
        limits: may be exchanged while a fleet runs: what a model was measured to need replaces the guess.
    """

    def __init__(self, limits: Limits | None = None, machine: Callable[[], Machine] = look) -> None:
        self.limits = limits or Limits()
        self._look = machine
        self._monitoring = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._looks: deque[SystemResources] = deque(maxlen=_HISTORY)

    def detect_system_resources(self) -> SystemResources:
        """Looks at the machine.

        Raises:
            UserError, OSError: it cannot be seen.
        """
        found = self._look()
        workers = self._allowed(found, 0)[0]
        seen = SystemResources(found.cpus, found.memory / GB, found.free_memory / GB, 100 * found.load, workers)
        logger.debug("machine: %s", seen)
        return seen

    def validate_worker_count(self, requested: int, held: float = 0.0, own_load: float = 0.0) -> tuple[int, str]:
        """How many of ``requested`` models may run at once, and why.

        Args:
            held: bytes that this fleet's models hold now: they are not taken from what the machine has for it.
            own_load: share of the CPUs that they keep busy.

        Returns:
            A number from 1, and the reason in a sentence. Where the machine cannot be seen it is 1.
        """
        if requested < 1:
            return 1, f"Invalid worker count {requested}: using 1"
        try:
            found = self._look()
        except (UserError, OSError, ArithmeticError, AttributeError, RuntimeError, ValueError) as error:
            return 1, f"The machine cannot be seen ({error}): using 1"
        spare = found._replace(free_memory=found.free_memory + held, load=max(0.0, found.load - own_load))
        return self._allowed(spare, requested)

    def _allowed(self, machine: Machine, requested: int) -> tuple[int, str]:
        """(number, reason); ``requested`` 0: as many as there is room for."""
        limits, wanted = self.limits, requested or machine.cpus
        free, each = machine.free_memory / GB, limits.memory_per_worker_gb
        bounds = [
            (
                int(free // each),
                f"Memory warning: {wanted} workers need {_gb(wanted * each)}GB, but only {_gb(free)}GB available",
            ),
            (
                int(machine.cpus // limits.cpus_per_worker),
                f"{wanted} workers need {_gb(wanted * limits.cpus_per_worker)} CPUs, but only {machine.cpus} available",
            ),
        ]
        if machine.load > limits.high_load:
            bounds.append((1, f"The CPUs are busy ({machine.load:.0%} > {limits.high_load:.0%}): using 1"))
        if free < limits.min_free_memory_gb:
            bounds.append((1, f"Only {_gb(free)}GB of memory are free (< {_gb(limits.min_free_memory_gb)}GB): using 1"))
        most, reason = min(bounds, key=lambda bound: bound[0])
        if most >= wanted:
            return wanted, f"{wanted} workers fit: {_gb(free)}GB free, {machine.cpus} CPUs"
        return max(1, most), reason

    def start_monitoring(self, interval: float = 5.0) -> None:
        """Looks at the machine every ``interval`` seconds, in a thread, until :meth:`stop_monitoring`."""
        if not (interval > 0 and math.isfinite(interval)):
            raise ValueError(f"interval {interval}: expected a number of seconds above 0")
        if self._monitoring:
            return
        self._monitoring = True
        self._stop.clear()
        self._thread = threading.Thread(target=self._monitor, args=(interval,), name="resources", daemon=True)
        self._thread.start()

    def _monitor(self, interval: float) -> None:
        while True:
            try:
                self._looks.append(self.detect_system_resources())
            except (UserError, OSError) as error:
                logger.warning("the machine cannot be seen: %s", error)
            if self._stop.wait(interval):
                return

    def stop_monitoring(self) -> None:
        """Ends the thread; a second time does nothing."""
        self._monitoring = False
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def get_current_metrics(self) -> dict[str, Any]:
        """The newest look of the monitor (or one now), and the extremes since it began."""
        looks = list(self._looks) or [self.detect_system_resources()]
        return {
            **vars(looks[-1]),
            "looks": len(looks),
            "least_available_memory_gb": min(one.available_memory_gb for one in looks),
            "most_cpu_usage_percent": max(one.cpu_usage_percent for one in looks),
        }

    def generate_resource_report(self) -> dict[str, Any]:
        """What the machine has, what it is good for, and what limits it."""
        now, limits = self.get_current_metrics(), self.limits
        workers, free = now["recommended_workers"], now["available_memory_gb"]
        constraints = {
            "memory": free < max(limits.min_free_memory_gb, 2 * limits.memory_per_worker_gb),
            "cpus": now["cpu_count"] < 2 * limits.cpus_per_worker,
            "load": now["cpu_usage_percent"] > 100 * limits.high_load,
        }
        return {
            "system_info": now,
            "recommendations": {
                "training_mode_suggestion": "parallel" if workers > 1 else "series",
                "max_workers": workers,
            },
            "constraints": constraints,
            "limits": vars(limits),
        }


def get_optimal_workers(requested: int, manager: ResourceManager | None = None) -> tuple[int, str]:
    """How many of ``requested`` models this machine should train at once, and why."""
    return (manager or ResourceManager()).validate_worker_count(requested)


def _gb(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
