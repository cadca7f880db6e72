"""What can be wrong with a run: each kind of alert, and how it is seen.

A run sees most by itself, in the numbers of its steps (:meth:`AlertKind.of_steps`). What a process that is dead or
stuck cannot say of itself is seen in its files by ``tools/watch_runs.py`` (:meth:`AlertKind.of_files`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Protocol

from megaforge.config.config import Config
from megaforge.config.pattern import kinds_of
from megaforge.monitor import watch_rules
from megaforge.monitor.alerts import Finding
from megaforge.monitor.spikes import LEAST, is_spike
from megaforge.monitor.watch_rules import FileRule

Values = Mapping[str, float]
SLOW_STEPS = 8  # whose median is the throughput now
WARM_UP = 5  # first steps of a process, which compile and fill caches, and tell nothing of its speed
CLEAR_AFTER = 10  # steps in a row without it that end what one step can begin
COLLAPSED_STEPS = 10  # in a row, before experts count as collapsed


class StepRule(Protocol):
    """Looks at one thing in the numbers of each step.

    Attributes:
        fire_after, clear_after: findings in a row that begin an alert, and that end it.
    """

    fire_after: int
    clear_after: int

    def judge(self, iteration: int, values: Values) -> Finding | None:
        """How it stands after ``iteration``, whose record (:mod:`megaforge.monitor.names`) is ``values``; None: the
        record does not tell."""
        ...


class AlertKind:
    """One kind of alert; :data:`megaforge.registry.ALERTS` has them by name.

    Attributes:
        severity: ``critical``: somebody has to act; or ``warning``.
        meaning: when it fires, for documents.
    """

    severity = "warning"
    meaning = ""

    def of_steps(self, config: Config) -> StepRule | None:
        """What sees it in the steps of a run; None: they do not tell of it."""
        return None

    def of_files(self, heartbeat_minutes: float) -> FileRule | None:
        """What sees it in the files of a run, one for each run; None: they do not tell of it.

        Args:
            heartbeat_minutes: for which a run may tell nothing.
        """
        return None


class _SeenFromOutside(AlertKind):
    """What a run cannot say of itself: only its files tell."""

    severity = "critical"

    def __init__(self, meaning: str, rule: Callable[[float], FileRule]) -> None:
        """``rule``: makes what looks at one run, of the minutes for which it may tell nothing."""
        self.meaning, self._rule = meaning, rule

    def of_files(self, heartbeat_minutes: float) -> FileRule:
        return self._rule(heartbeat_minutes)


class _NotANumber(AlertKind):
    severity = "critical"
    meaning = "the loss or the gradient norm of a step is not finite"

    def of_steps(self, config: Config) -> StepRule:
        return NotANumber()


class NotANumber:
    """A loss or gradient norm that is not finite. Gradients that overflow under ``--fp16`` are not counted: the loss
    scale answers them."""

    fire_after, clear_after = 1, CLEAR_AFTER

    def judge(self, iteration: int, values: Values) -> Finding:
        names = ["loss"] if "loss_scale" in values else ["loss", "grad_norm"]
        for name in names:
            if not math.isfinite(values[name]):
                return Finding(True, f"the {_words(name)} is {values[name]} at iteration {iteration}")
        return Finding(False, f"the loss is finite at iteration {iteration}", values["loss"])


class _LossSpike(AlertKind):
    meaning = "the loss is far above what the steps before lead to expect, or the run went back behind a spike"

    def of_steps(self, config: Config) -> StepRule:
        return LossSpike(config.alerts.alert_window)


class LossSpike:
    """A loss above the median of the last ``window`` by 6 standard deviations and a tenth
    (:func:`megaforge.monitor.spikes.is_spike`). Spikes enter the window: a level that stays becomes the usual one."""

    fire_after, clear_after = 1, CLEAR_AFTER

    def __init__(self, window: int) -> None:
        self._seen: deque[float] = deque(maxlen=window)
        self._least = window // 4

    def judge(self, iteration: int, values: Values) -> Finding | None:
        loss = values["loss"]
        if not math.isfinite(loss):
            return None
        seen = list(self._seen)
        self._seen.append(loss)
        if len(seen) < self._least:
            return None
        usual = median(seen)
        bad = is_spike(loss, seen, LEAST["loss"])
        verb = "spikes to" if bad else "is"
        text = f"the loss {verb} {loss:.4g} at iteration {iteration} (median of {len(seen)} steps: {usual:.4g})"
        return Finding(bad, text, loss, usual)


class _Throughput(AlertKind):
    meaning = "the tokens per second are below a share of their median"

    def of_steps(self, config: Config) -> StepRule:
        return Throughput(config.alerts.alert_window, config.alerts.alert_throughput_share)


class Throughput:
    """The median of the tokens per second of the last :data:`SLOW_STEPS` steps, below ``share`` of the median of
    ``window`` steps before them. While they are, the slow steps do not become the usual ones."""

    fire_after = clear_after = 1

    def __init__(self, window: int, share: float) -> None:
        self._share, self._now = share, deque[float](maxlen=SLOW_STEPS)
        self._usual: deque[float] = deque(maxlen=window)
        self._least, self._steps, self._bad = window // 4, 0, False

    def judge(self, iteration: int, values: Values) -> Finding | None:
        self._steps += 1
        if self._steps <= WARM_UP:
            return None
        if len(self._now) == SLOW_STEPS and not self._bad:
            self._usual.append(self._now[0])
        self._now.append(values["tokens_per_second"])
        if len(self._usual) < self._least:
            return None
        now, usual = median(self._now), median(self._usual)
        limit = self._share * usual
        self._bad = now < limit
        text = (
            f"{now:.4g} tokens per second at iteration {iteration} (median of {SLOW_STEPS} steps), "
            f"{now / usual:.0%} of the {usual:.4g} before"
        )
        return Finding(self._bad, text, now, limit)


class _Memory(AlertKind):
    meaning = "a rank's memory, or a machine's, is fuller than a share"

    def of_steps(self, config: Config) -> StepRule:
        return Fullness(config.alerts.alert_memory_share, "memory", "memory_share", "host_memory_share")


class _Disk(AlertKind):
    meaning = "a disk that the run writes to is fuller than a share"

    def of_steps(self, config: Config) -> StepRule:
        return Fullness(config.alerts.alert_disk_share, "disk", "disk_share")


class Fullness:
    """The greatest of some shares of what there is, above ``limit``."""

    fire_after = clear_after = 1

    def __init__(self, limit: float, what: str, *names: str) -> None:
        """``names``: of the record's numbers."""
        self._limit, self._what, self._names = limit, what, names

    def judge(self, iteration: int, values: Values) -> Finding | None:
        found = [values[name] for name in self._names if name in values]
        if not found:
            return None
        share = max(found)
        text = f"the fullest {self._what} of the run is {share:.1%} full (limit {self._limit:.0%})"
        return Finding(share > self._limit, text, share, self._limit)


class _ExpertCollapse(AlertKind):
    meaning = "the tokens of some layer go to few of its experts"

    def of_steps(self, config: Config) -> StepRule | None:
        model = config.model
        experts = [kind.experts(model)[1] for kind in kinds_of(model) if kind.has_experts]
        floors = [model.moe_router_topk / number for number in experts if number > model.moe_router_topk]
        return ExpertCollapse(min(floors), config.alerts.alert_expert_use) if floors else None


class ExpertCollapse:
    """Experts that the tokens of the least even layer go to, as a share of all (``experts_used``), less than ``use``
    of the way from ``floor``, where one token's experts get all, to 1, where all are alike."""

    fire_after, clear_after = COLLAPSED_STEPS, CLEAR_AFTER

    def __init__(self, floor: float, use: float) -> None:
        self._limit = floor + use * (1 - floor)

    def judge(self, iteration: int, values: Values) -> Finding | None:
        used = values.get("experts_used")
        if used is None:
            return None
        text = (
            f"the tokens of a layer go to {used:.0%} of its experts at iteration {iteration}, by their entropy (limit "
            f"{self._limit:.0%})"
        )
        return Finding(used < self._limit, text, used, self._limit)


class StepAlert:
    """One kind over the steps of a run: what its rule finds counts once it was found often enough in a row."""

    def __init__(self, rule: StepRule) -> None:
        self._rule, self._bad, self._row = rule, False, 0

    def judge(self, iteration: int, values: Values) -> Finding | None:
        """What is to be entered in the book after this step; None: nothing new."""
        found = self._rule.judge(iteration, values)
        if found is None:
            return None
        if found.bad == self._bad:
            self._row = 0
            return found
        self._row += 1
        if self._row < (self._rule.fire_after if found.bad else self._rule.clear_after):
            return None
        self._bad, self._row = found.bad, 0
        return found

    def force(self, text: str) -> Finding:
        """It is so, whatever the numbers of steps say; they end it."""
        self._bad, self._row = True, 0
        return Finding(True, text)


def _words(name: str) -> str:
    return {"grad_norm": "gradient norm"}.get(name, name)


FAILURE = _SeenFromOutside(
    "the run ended by an error, or its process is gone",
    lambda _: watch_rules.Failure(),
)
NO_HEARTBEAT = _SeenFromOutside(
    "the run has not ended, and tells nothing",
    watch_rules.Silence,
)
COMPLIANCE = _SeenFromOutside(
    "the audit trail is broken, or the compliance report does not pass",
    lambda _: watch_rules.Compliance(),
)
NAN, LOSS_SPIKE, THROUGHPUT = _NotANumber(), _LossSpike(), _Throughput()
MEMORY, DISK, EXPERT_COLLAPSE = _Memory(), _Disk(), _ExpertCollapse()
