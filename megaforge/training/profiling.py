"""``--profile``: what the steps between two iterations spend their time on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from megaforge.config.launcher import print_rank_0
from megaforge.config.run_config import LoggingConfig
from megaforge.device import mark_profiled_range, synchronize
from megaforge.errors import UserError
from megaforge.training.callbacks import Callback
from megaforge.training.metrics import StepMetrics

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer

_ROWS = 10


class Profile(Callback):
    """Profiles the steps after iteration ``--profile-step-start`` up to ``--profile-step-end`` on some ranks; the last
    of the callbacks.

    With torch's profiler it writes a trace that TensorBoard, Perfetto and chrome://tracing open, and a table of
    operators. Under ``nsys profile --capture-range=cudaProfilerApi`` it marks the range for that profiler instead.
    """

    def __init__(self, config: LoggingConfig) -> None:
        self.config = config
        self._running: Any = None
        self._first = 0
        self._under_nsys = "NSYS_PROFILING_SESSION_ID" in os.environ

    def on_train_start(self, trainer: Trainer) -> None:
        last, ranks = trainer.config.training.train_iters, trainer.ctx.world.size
        if self.config.profile_step_start >= last:
            raise UserError(
                f"--profile-step-start {self.config.profile_step_start}: the run ends after iteration {last}; give an "
                "earlier one"
            )
        beyond = [rank for rank in self.config.profile_ranks if rank >= ranks]
        if beyond:
            raise UserError(f"--profile-ranks {beyond[0]}: the run has ranks 0 to {ranks - 1}")
        if trainer.iteration >= self.config.profile_step_end:
            print_rank_0(f"--profile: nothing to do, iteration {self.config.profile_step_end} is past")
        self._begin(trainer)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._first and (metrics.iteration >= self.config.profile_step_end or trainer.finished):
            self._end(trainer)
        self._begin(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self._end(trainer)

    def _begin(self, trainer: Trainer) -> None:
        inside = self.config.profile_step_start <= trainer.iteration < self.config.profile_step_end
        if self._first or trainer.finished or not inside or trainer.ctx.world.rank not in self.config.profile_ranks:
            return
        self._first = trainer.iteration + 1
        synchronize(trainer.ctx.device)
        if self._under_nsys and trainer.ctx.device.type == "cuda":
            mark_profiled_range(begins=True)
            return
        activities = [ProfilerActivity.CPU]
        if trainer.ctx.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._running = profile(activities=activities)
        self._running.start()

    def _end(self, trainer: Trainer) -> None:
        if not self._first:
            return
        synchronize(trainer.ctx.device)
        first, self._first = self._first, 0
        if self._running is None:
            mark_profiled_range(begins=False)
            return
        running, self._running = self._running, None
        running.stop()
        name = f"rank{trainer.ctx.world.rank}-iterations-{first}-{trainer.iteration}"
        device = "device" if trainer.ctx.device.type == "cuda" else "cpu"
        trace, table = _write(running, Path(self.config.profile_dir), name, device)
        print("\n".join(top_operators(running.key_averages(), device)), flush=True)
        print(f"profile of iterations {first} to {trainer.iteration}: {trace} and {table}", flush=True)


def _write(running: Any, directory: Path, name: str, device: str) -> tuple[Path, Path]:
    """A trace and a table under names that nothing has yet."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            stem = name if number == 1 else f"{name}-{number}"
            trace, table = directory / f"{stem}.pt.trace.json.gz", directory / f"{stem}.txt"
            if not trace.exists() and not table.exists():
                break
        running.export_chrome_trace(str(trace))
        sort = f"self_{device}_time_total"
        table.write_text(running.key_averages().table(sort_by=sort, row_limit=200), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--profile-dir {directory}: cannot be written ({error.strerror or error})") from error
    return trace, table


def top_operators(events: Sequence[Any], device: str) -> list[str]:
    """The operators that take the most time of their own on ``device`` (cpu or device), as lines of a table."""
    times = {event.key: (getattr(event, f"self_{device}_time_total"), event.count) for event in events}
    total = sum(time for time, _ in times.values()) or 1.0
    rows = sorted(times.items(), key=lambda item: -item[1][0])[:_ROWS]
    return [f"{'own time':>10}  {'share':>6}  {'calls':>6}  operator"] + [
        f"{time / 1000:>7.1f} ms  {time / total:>6.1%}  {count:>6}  {key[:60]}" for key, (time, count) in rows
    ]
