"""Runs the models of a fleet, so many at once as the machine has room for, until each is complete or cannot be."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from megaforge.checkpoint.lock import take_lock
from megaforge.errors import UserError
from megaforge.fleet.machine import GB, free_disk
from megaforge.fleet.model import ATTEMPT, STOP_FILE, Model, State
from megaforge.fleet.processes import Job, LocalJob
from megaforge.fleet.recipe import Fleet, FleetSettings
from megaforge.fleet.report import Report, write_report
from megaforge.fleet.resources import Limits, ResourceManager
from megaforge.monitor.events import EventLog, process_birth, read_events
from megaforge.monitor.runs import Status
from megaforge.monitor.runs_folder import FLEET_FILE, overall_of

COMPLETE_STATUS, FAILED_STATUS, LEFT_STATUS = 0, 1, 3
_TICK = 0.2  # seconds between looks at the processes
_HEADROOM = 1.1  # on the memory that a model was seen to need
_STEPS_SEEN = 2  # after so many steps a model has held what it will hold

Starter = Callable[[Model, int], Job]


class Supervisor:
    """One fleet, from its file to its report. For the main thread of a process of its own."""

    def __init__(self, fleet: Fleet, manager: ResourceManager | None = None, starter: Starter | None = None) -> None:
        """
        Args:
            manager: what says how many models may run at once; its limits are the fleet's.
            starter: starts a model with so many threads a rank; default: processes of this machine.

        Raises:
            UserError: a model's flags cannot be, the fleet's output is missing, or the disk has no room.
        """
        self.settings = fleet.settings
        if self.settings.output is None:
            raise UserError("--output is missing: name the fleet's directory, there or as 'output' in its file")
        self.output = Path(self.settings.output)
        self.models = [Model(one, self.output) for one in fleet.models]
        for model in self.models:
            model.check()
        self.manager = manager or ResourceManager()
        self.manager.limits = _limits(self.settings)
        self._starter = starter or (self._local if self.settings.launcher == "local" else self._submitted)
        self._waiting = deque(self.models)
        self._most = self.settings.workers if self.settings.mode == "parallel" else 1
        self._allowed, self._why = 1, ""
        self._threads, self._recommended = 1, 0
        self._began, self._asked = time.time(), 0.0
        self._signals: list[int] = []
        self._asked_to_stop: set[str] = set()
        self._looked = self._logged = 0.0
        self._cpu = (0.0, 0.0)  # when, and processor seconds of the models then
        self._own_load, self._measured = 0.0, 0.0
        self.events = EventLog()

    def run(self) -> int:
        """Trains; returns the status to leave with: 0 all are complete, 1 some failed, 3 something is left to do.

        Raises:
            UserError: another fleet writes there, or what an earlier one started does not end.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.output}: cannot be made ({error.strerror}); name another") from error
        lock = take_lock(self.output)
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._check_disk()
            self._wait_for_leftovers()
            self._begin()
            while self._waiting or self._running():
                self._tick()
                time.sleep(_TICK)
            return self._finish()
        finally:
            for model in self._running():
                assert model.job is not None
                model.job.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
            lock.release()

    def _begin(self) -> None:
        path = self.output / FLEET_FILE
        kept = _threads_before(path)
        self.events = EventLog(path)
        self._allowed, self._why = self._room(self._most)
        if self.settings.mode == "parallel" and self._allowed < self._most:
            _say(self._why)
        ranks = max(model.settings.ranks for model in self.models)
        share = max(1, len(os.sched_getaffinity(0)) // (self._allowed * ranks))
        self._threads = self.settings.threads or kept or share
        self._began, self._looked = time.time(), time.monotonic()
        self.events.tell(
            "fleet_start",
            host=socket.gethostname(),
            pid=os.getpid(),
            born=process_birth("self"),
            mode=self.settings.mode,
            workers=self._allowed,
            requested=self._most,
            reason=self._why,
            threads=self._threads,
            models=[
                {
                    "name": model.name,
                    "train_iters": model.train_iters,
                    "directory": os.path.relpath(model.directory, self.output),
                }
                for model in self.models
            ],
        )
        at_once = "one after the other" if self._allowed == 1 else f"{self._allowed} at once"
        _say(f"{len(self.models)} models, {at_once}, {self._threads} threads a rank; progress: {path}")

    def _running(self) -> list[Model]:
        return [model for model in self.models if model.state is State.RUNNING]

    def _tick(self) -> None:
        """One look at everything."""
        for model in self._running():
            self._heed_stop_file(model)
            assert model.job is not None
            status = model.job.poll()
            if status is not None:
                self._ended(model, status)
        if self._signals:
            self._end_all()
        now = time.monotonic()
        if now - self._looked >= self.settings.monitor_seconds:
            self._looked = now
            self._look()
        while self._waiting and len(self._running()) < self._allowed:
            self._start(self._waiting.popleft())
        if now - self._logged >= self.settings.log_seconds and self._running():
            self._logged = now
            self._say_progress()

    def _start(self, model: Model) -> None:
        if _taken_away(model.directory / STOP_FILE):
            model.state, model.reason = State.STOPPED, f"{STOP_FILE} was there before it began"
            self.events.tell("model_end", model=model.name, state=model.state, reason=model.reason)
            return
        model.attempts += 1
        try:
            model.prepare()
            with model.console.open("a", encoding="utf-8") as file:
                file.write(f"{ATTEMPT}{model.attempts}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            model.job = self._starter(model, self._threads)
        except (OSError, UserError, RuntimeError) as error:  # submitit's FailedSubmissionError is a RuntimeError
            model.state, model.reason = State.FAILED, str(error)
            self.events.tell("model_end", model=model.name, state=model.state, reason=model.reason)
            _say(f"{model.name}: cannot be started: {error}")
            return
        model.state, model.began = State.RUNNING, time.monotonic()
        told = {"model": model.name, "attempt": model.attempts, "pid": model.job.pid, "threads": self._threads}
        self.events.tell("model_start", **told)
        _say(f"{model.name}: attempt {model.attempts} began; its output: {model.console}")

    def _local(self, model: Model, threads: int) -> Job:
        environment = model.environment(threads)
        return LocalJob(model.line(), model.console, environment, self.settings.stop_seconds)

    def _submitted(self, model: Model, threads: int) -> Job:
        from megaforge.fleet.slurm import submit

        cpus = threads * model.settings.ranks
        return submit(self.settings, model.line(), model.directory, model.console, model.environment(threads), cpus)

    def _ended(self, model: Model, status: int) -> None:
        at_once = len(self._running())
        model.seconds += time.monotonic() - model.began
        model.ended(status)
        model.job = None
        self.events.tell(
            "model_end",
            model=model.name,
            attempt=model.attempts,
            state=model.state,
            reason=model.reason,
            status=status,
            peak_memory_bytes=model.peak_memory,
        )
        _say(f"{model.name}: {model.state} after {model.run.iteration} steps ({model.reason})")
        self._remember(model.peak_memory)
        self._looked = 0.0  # the next look is now
        if model.ran_out_of_memory(status) and self._most > 1:
            self._most = max(1, min(self._most, at_once) - 1)
            self._tell_workers(f"{model.name} was out of memory, or killed", min(self._allowed, self._most))
        if self._time_was_over(model):
            model.state = State.WAITING
            self._waiting.appendleft(model)
        if model.can_be_tried_again(status) and model.retried < self.settings.retries and not self._signals:
            model.retried += 1
            model.state = State.WAITING
            self.events.tell("model_retry", model=model.name, attempt=model.attempts + 1, reason=model.reason)
            _say(f"{model.name}: it is tried again, from its newest checkpoint")
            self._waiting.appendleft(model)

    def _time_was_over(self, model: Model) -> bool:
        """Whether a job ended by itself because its time did: another one goes on from what it saved."""
        asked = model.name in self._asked_to_stop or bool(self._signals)
        got_on, model.reached = model.run.iteration > model.reached, model.run.iteration
        return model.state is State.STOPPED and self.settings.launcher != "local" and got_on and not asked

    def _heed_stop_file(self, model: Model) -> None:
        if _taken_away(model.directory / STOP_FILE) and model.job is not None:
            _say(f"{model.name}: {STOP_FILE} is there: it is asked to save and end")
            self._asked_to_stop.add(model.name)
            model.job.ask_to_end()

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)
        if len(self._signals) > 1 and time.monotonic() - self._asked >= 3.0:  # launchers pass on what all have heard
            raise KeyboardInterrupt
        if len(self._signals) == 1:
            self._asked = time.monotonic()

    def _end_all(self) -> None:
        """Asks every model to save and end, and kills what has not done so in time."""
        self._waiting.clear()
        for model in self._running():
            assert model.job is not None
            model.job.ask_to_end()
            if time.monotonic() - self._asked > self.settings.stop_seconds:
                _say(f"{model.name}: it did not end in {self.settings.stop_seconds:g} s and is killed")
                model.job.kill()

    def _look(self) -> None:
        """Looks at the machine and at the models, and says so where there is room for more or for fewer."""
        cpu = 0.0
        for model in self._running():
            assert model.job is not None
            model.job.look()
            model.run.poll()
            model.measure()
            cpu += model.job.cpu_seconds()
            if len(model.run.steps) >= _STEPS_SEEN:
                self._remember(model.peak_memory)
        now, (then, earlier) = time.monotonic(), self._cpu
        self._own_load = max(0.0, cpu - earlier) / max(now - then, 1e-3) / (os.cpu_count() or 1)
        self._cpu = (now, cpu)
        allowed, why = self._room(self._most)
        if allowed != self._allowed:
            self._tell_workers(why, allowed)
        self._recommend()

    def _recommend(self) -> None:
        """Says how many models the machine has room for, whenever that changes, whatever was asked for."""
        if self.settings.launcher != "local":
            return
        held = sum(model.job.memory() for model in self._running() if model.job is not None)
        number, why = self.manager.validate_worker_count(len(self.models), held, self._own_load)
        if number != self._recommended:
            self._recommended = number
            self.events.tell("recommendation", workers=number, reason=why)
            if number != self._allowed:
                mode = "parallel" if number > 1 else "series"
                _say(f"the machine has room for {number} at once: --mode {mode} --workers {number} ({why})")

    def _room(self, wanted: int) -> tuple[int, str]:
        """How many models may run at once."""
        if self.settings.launcher != "local":
            return wanted, f"{self.settings.launcher} finds the room"
        if wanted == 1:
            return 1, "series" if self.settings.mode == "series" else "one worker is asked for, or left"
        held = sum(model.job.memory() for model in self._running() if model.job is not None)
        return self.manager.validate_worker_count(wanted, held, self._own_load)

    def _tell_workers(self, why: str, allowed: int) -> None:
        self._allowed, self._why = allowed, why
        self.events.tell("workers", workers=allowed, reason=why)
        _say(f"models at once from now on: {allowed} ({why})")

    def _remember(self, peak: float) -> None:
        """What a model was seen to need replaces the guess of what each needs."""
        if peak > 1.05 * self._measured:
            self._measured = peak
            needs = _HEADROOM * peak / GB
            self.manager.limits = dataclasses.replace(
                self.manager.limits, memory_per_worker_gb=needs, min_free_memory_gb=0.0
            )
            self.events.tell("measured", memory_per_worker_gb=round(needs, 3))

    def _say_progress(self) -> None:
        overall = overall_of([model.run for model in self.models])
        eta = "" if overall.eta_seconds is None else f", {overall.eta_seconds / 60:.1f} min left"
        parts = [f"{model.name} {model.run.iteration}/{model.train_iters or '?'}" for model in self._running()]
        _say(f"{overall.line()}{eta} ({', '.join(parts)})")

    def _finish(self) -> int:
        report = Report(self.settings, self.models, time.time() - self._began, self._threads)
        write_report(self.output, report)
        states = [model.state for model in self.models]
        counts = {str(state): states.count(state) for state in State if state in states}
        self.events.tell("fleet_end", **counts)
        print(report.table(), flush=True)
        if State.FAILED in states:
            return FAILED_STATUS
        return COMPLETE_STATUS if all(state is State.COMPLETED for state in states) else LEFT_STATUS

    def _check_disk(self) -> None:
        needs, has = self.settings.disk_gb_per_model * len(self.models), free_disk(self.output) / GB
        if needs > has:
            raise UserError(
                f"--output {self.output}: {len(self.models)} models need {needs:g}GB of disk, but only {has:.1f}GB are "
                f"free; make room, or lower disk_gb_per_model ({self.settings.disk_gb_per_model:g})"
            )

    def _wait_for_leftovers(self) -> None:
        """Waits until what a killed supervisor has left is gone: it saves, and ends."""
        until = time.monotonic() + self.settings.stop_seconds
        for model in self.models:
            said = False
            while model.run.poll() or model.run.status is Status.RUNNING:
                if model.run.status is Status.RUNNING and not said:
                    _say(f"{model.name}: waiting until process {model.run.start.get('pid')} has saved and ended")
                    said = True
                if time.monotonic() > until:
                    raise UserError(
                        f"--output {self.output}: {model.name} is being trained there, by process "
                        f"{model.run.start.get('pid')}; end it, or name another directory"
                    )
                time.sleep(_TICK)


def _limits(settings: FleetSettings) -> Limits:
    names = [one.name for one in dataclasses.fields(Limits)]
    return Limits(**{name: getattr(settings, name) for name in names})


def _threads_before(path: Path) -> int | None:
    """With how many threads a rank this fleet has begun: sums in another order would give other bits."""
    if not path.exists():
        return None
    started = [event for event in read_events(path).events if event["kind"] == "fleet_start"]
    found: Any = started[-1].get("threads") if started else None
    return found if isinstance(found, int) and found > 0 else None


def _taken_away(path: Path) -> bool:
    """Whether a file was there; it is not any more."""
    try:
        path.unlink()
        return True
    except OSError:
        return False


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
