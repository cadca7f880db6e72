"""``--prometheus-port``: the run's newest numbers for Prometheus (https://prometheus.io) to fetch.

``docs/prometheus.md`` shows the names and units (:func:`table`); they are those of :mod:`megaforge.monitor.names`.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from megaforge.errors import UserError, require
from megaforge.monitor.names import EVALUATION, STEP
from megaforge.monitor.sinks import Kind

PREFIX = {"step": "megaforge_train_", "evaluation": "megaforge_valid_", "test": "megaforge_test_"}
BY_PART = "_by_part"  # ends the names of what is told of each part, in a label: grad_norm/moe, say
# What a number is counted in, where its name does not end with it.
UNITS = {
    "loss": "nats",
    "mtp_loss": "nats",
    "mod_loss": "nats",
    "distill": "nats",
    "relations": "nats",
    "tokens": "tokens",
    "consumed_samples": "samples",
    "global_batch_size": "samples",
    "num_zeros": "elements",
    "page_faults": "pages",
    "bits_per_byte": "bits per byte of text",
}
_ENDINGS = {"_seconds": "seconds", "_bytes": "bytes", "_per_second": "tokens per second", "_bits": "bits"}
OWN = {  # name: (unit, meaning)
    "megaforge_run_info": (
        "1",
        "1; its labels say what runs: `config`, `version`, `commit`, `dirty`, the layout's sizes: `world`, `tp`, ...",
    ),
    "megaforge_iteration": ("steps", "optimizer steps done"),
    "megaforge_train_iters": ("steps", "optimizer steps that the run is to make"),
    "megaforge_last_step_timestamp_seconds": ("seconds since 1970", "when the newest step was recorded"),
    "megaforge_alert_firing": ("1", "1 where the alert of the label `alert` fires, else 0 ([alerts](alerts.md))"),
}


def metric_name(kind: str, name: str) -> tuple[str, str | None]:
    """What Prometheus calls the number ``name`` of records of ``kind``, and its part (the label) where it has one."""
    head, slash, part = name.partition("/")
    clean = re.sub(r"[^a-zA-Z0-9_]", "_", head)
    return PREFIX[kind] + clean + (BY_PART if slash else ""), part if slash else None


def unit(name: str) -> str:
    """What the number ``name`` of a record is counted in; ``1``: it has no unit."""
    head = name.partition("/")[0]
    endings = (word for ending, word in _ENDINGS.items() if head.endswith(ending))
    return UNITS.get(head) or next(endings, "1")


def table() -> str:
    """All names with their units as Markdown."""
    lines = ["| metric | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {unit_} | {meaning} |" for name, (unit_, meaning) in OWN.items()]
    for kind, names in (("step", STEP), ("evaluation", EVALUATION)):
        for name, about in names.items():
            shown, part = metric_name(kind, name)
            label = "" if part is None else f'`{{part="{part}"}}`'
            lines.append(f"| `{shown}`{label} | {unit(name)} | {about.text} |")
    return "\n".join(lines)


class PrometheusSink:
    """Serves what it was last told over HTTP, from a thread; a fetch costs the run nothing but a lock."""

    def __init__(
        self,
        port: int,
        address: str,
        run: str,
        info: Mapping[str, str],
        train_iters: int,
        alerts: Callable[[], Mapping[str, bool]] = dict,
    ) -> None:
        """
        Args:
            run: the label ``run`` of every number.
            info: further labels of ``megaforge_run_info``.
            alerts: asked at each fetch: whether each alert fires.

        Raises:
            UserError: there is no ``prometheus_client``, or the port cannot be had.
        """
        self._client = require("prometheus_client", extra="prometheus", purpose="--prometheus-port")
        self._core: Any = require("prometheus_client.core", extra="prometheus", purpose="--prometheus-port")
        self._run, self._info, self._train_iters, self.alerts = run, dict(info), train_iters, alerts
        self._lock, self._iteration, self._told = threading.Lock(), 0, 0.0
        self._values: dict[tuple[str, str | None], float] = {}
        registry = self._client.CollectorRegistry(auto_describe=False)
        registry.register(self)
        self._client.ProcessCollector(registry=registry)
        try:
            self._server, self._thread = self._client.start_http_server(port, addr=address, registry=registry)
        except OSError as error:  # of an address that has no meaning, too
            raise UserError(
                f"--prometheus-port {port}: it cannot be listened on at --prometheus-address {address} "
                f"({error.strerror or error}); look who has it (ss -ltnp), or give another port, one to each run"
            ) from error

    def write(self, kind: Kind, iteration: int, values: Mapping[str, float | int]) -> None:
        named = {metric_name(kind, name): float(value) for name, value in values.items()}
        with self._lock:
            self._values |= named
            if kind == "step":
                self._iteration, self._told = iteration, time.time()

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Ends the server: the run is over."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)

    def collect(self) -> Iterator[Any]:
        """What ``prometheus_client`` asks for at each fetch: families of gauges."""
        with self._lock:
            values, iteration, told = dict(self._values), self._iteration, self._told
        yield self._gauge("megaforge_run_info", [({**self._info}, 1.0)])
        yield self._gauge("megaforge_iteration", [({}, float(iteration))])
        yield self._gauge("megaforge_train_iters", [({}, float(self._train_iters))])
        if told:
            yield self._gauge("megaforge_last_step_timestamp_seconds", [({}, told)])
        firing = [({"alert": name}, float(fires)) for name, fires in self.alerts().items()]
        yield self._gauge("megaforge_alert_firing", firing)
        parts: dict[str, list[tuple[dict[str, str], float]]] = {}
        for (name, part), value in values.items():
            parts.setdefault(name, []).append(({} if part is None else {"part": part}, value))
        for name, samples in parts.items():
            yield self._gauge(name, samples)

    def _gauge(self, name: str, samples: Iterable[tuple[dict[str, str], float]]) -> Any:
        family = self._core.GaugeMetricFamily(name, _HELP.get(name, "a number of the run's own"))
        for labels, value in samples:
            family.add_sample(name, {"run": self._run, **labels}, value)
        return family


def _help() -> dict[str, str]:
    found = {name: f"{meaning} [{unit_}]" for name, (unit_, meaning) in OWN.items()}
    for kind, names in (("step", STEP), ("evaluation", EVALUATION), ("test", EVALUATION)):
        found |= {metric_name(kind, name)[0]: f"{about.text} [{unit(name)}]" for name, about in names.items()}
    return {name: text.replace("`", "") for name, text in found.items()}


_HELP = _help()
