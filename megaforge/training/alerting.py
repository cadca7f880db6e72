"""Has a run raise alerts (:mod:`megaforge.monitor.alerts`) of what it sees of itself."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megaforge.checkpoint.checkpoint import layout_of
from megaforge.config.config import Config
from megaforge.monitor.alert_channels import Console, EventChannel, receivers_of
from megaforge.monitor.alert_kinds import AlertKind, StepAlert
from megaforge.monitor.alerts import AlertBook, Channel, Finding
from megaforge.monitor.events import EventLog, read_events
from megaforge.monitor.prometheus import PrometheusSink
from megaforge.monitor.provenance import code_version
from megaforge.monitor.sinks import MetricSink
from megaforge.registry import ALERTS
from megaforge.training.callbacks import Callback, Place
from megaforge.training.compliance_stage import ComplianceStage

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class Alerts(Callback):
    """Looks at the numbers of each step, at what takes the run back, and at what ends it; lives on the first rank. What
    fired when the run was last ended goes on until its numbers say that it is over.

    Attributes:
        book: how each alert stands.
    """

    place = Place.SHOW

    def __init__(self, config: Config, channels: list[Channel], run: str) -> None:
        flags = config.alerts
        names = [name for name in ALERTS.names() if name not in flags.alerts_off]
        kinds: dict[str, AlertKind] = {name: ALERTS.get(name) for name in names}
        rules = {name: kind.of_steps(config) for name, kind in kinds.items()}
        self._steps = {name: StepAlert(rule) for name, rule in rules.items() if rule is not None}
        self._kinds = kinds
        self.book = AlertBook(
            channels,
            run,
            socket.gethostname(),
            repeat=60 * flags.alert_repeat_minutes,
            severities=lambda name: kinds[name].severity,
        )

    @classmethod
    def of(cls, config: Config, events: EventLog) -> Alerts:
        """What the flags ask for; ``events`` are told too.

        Raises:
            UserError: a receiver cannot be reached.
        """
        channels: list[Channel] = [Console(), EventChannel(events), *receivers_of(config.alerts)]
        alerts = cls(config, channels, config.logging.run_name or config.name)
        if events.path is not None:
            told = [event for event in read_events(events.path).events if event.get("alert") in alerts._kinds]
            alerts.book.restore(told)
        return alerts

    def standing(self) -> dict[str, bool]:
        """Whether each alert fires that the run can raise. Any thread may ask."""
        firing = self.book.firing
        return {name: name in firing for name in ("failure", "compliance", *self._steps) if name in self._kinds}

    def on_train_start(self, trainer: Trainer) -> None:
        ended = self.book.firing.keys() - self._steps.keys() - {"compliance"}  # a failure, and what no rule looks for
        for name in ended:
            self.book.enter(name, Finding(False, f"the run goes on from iteration {trainer.iteration}"))

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        values = metrics.values()
        for name, alert in self._steps.items():
            if (found := alert.judge(metrics.iteration, values)) is not None:
                self.book.enter(name, found)

    def on_rollback(self, trainer: Trainer) -> None:
        if trainer.rollback is not None and trainer.rollback.last is not None:
            name, why = trainer.rollback.last
            self._raise(name, f"{why}; the run goes back to iteration {trainer.iteration}")

    def _raise(self, name: str, text: str) -> None:
        if name in self._steps:
            self.book.enter(name, self._steps[name].force(text))
        elif name in self._kinds:
            self.book.enter(name, Finding(True, text))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        if "compliance" not in self._kinds:
            return
        for stage in trainer.callbacks:
            if isinstance(stage, ComplianceStage) and stage.found is not None:
                found, asked = stage.found, stage.asked
                text = f"the compliance report {'passes' if found.passed else 'does not pass'}: {found.score:.4f}, and "
                text += f"{asked.compliance_level} with {asked.min_compliance_score:g} is asked for"
                finding = Finding(not found.passed, text, found.score, asked.min_compliance_score)
                self.book.enter("compliance", finding)

    def on_train_end(self, trainer: Trainer) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            if (cause := getattr(error, "alert", None)) in self._kinds:
                self._raise(cause, str(error))
            first = str(error).partition("\n")[0]
            if "failure" in self._kinds:
                text = f"the run ended at iteration {trainer.iteration} by {type(error).__name__}: {first}"
                self.book.enter("failure", Finding(True, text))
        elif error is None and trainer.complete:
            for name in self.book.firing.keys() & self._steps.keys():
                self.book.enter(name, Finding(False, "the run is complete"))
        self.book.close()


def tell_others(trainer: Trainer, sinks: list[MetricSink]) -> None:
    """Has the run raise alerts, and with ``--prometheus-port`` adds to ``sinks`` what serves them and its numbers. On
    the first rank.

    Raises:
        UserError: a receiver cannot be reached, or the port cannot be had.
    """
    config, flags = trainer.config, trainer.config.prometheus
    alerts = Alerts.of(config, trainer.events)
    trainer.add(alerts)
    if flags.prometheus_port is not None:
        layout = {name: str(size) for name, size in layout_of(trainer.ctx, len(trainer.model.chunks)).items()}
        told = {"config": config.name, **{name: str(value) for name, value in code_version().items()}}
        sinks.append(
            PrometheusSink(
                flags.prometheus_port,
                flags.prometheus_address,
                config.logging.run_name or config.name,
                told | layout,
                config.training.train_iters,
                alerts.standing,
            )
        )
