"""A training run looked at for one step: ``waits`` (where the host waits for the GPU) or ``kernels`` (GPU time)."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from megaforge.config.cli import parse_config
from megaforge.training.callbacks import Callback
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer, initialize_distributed
from tests.gpu.first_day.kernel_time import by_kind

WARM = 3  # steps before the one that is looked at


def place() -> str:
    """The innermost line of MegaForge on the stack."""
    ours = [frame for frame in traceback.extract_stack() if "/megaforge/" in frame.filename]
    return f"{ours[-1].filename.split('/megaforge/')[-1]}:{ours[-1].lineno}" if ours else "elsewhere"


class Waits(Callback):
    """Counts synchronizing calls of step WARM + 1, by the line that makes them."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def on_step_end(self, trainer, metrics) -> None:
        if trainer.iteration == WARM:
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *rest: self.note(str(message))
            torch.cuda.set_sync_debug_mode("warn")
        elif trainer.iteration == WARM + 1:
            torch.cuda.set_sync_debug_mode("default")
            for line, count in self.places.most_common():
                print(f"{count:6} {line}")
            print(f"waits: {sum(self.places.values())}")

    def note(self, message: str) -> None:
        if "synchroniz" in message:
            self.places[place()] += 1


class Kernels(Callback):
    """GPU time of step WARM + 1."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_step_end(self, trainer, metrics) -> None:
        if trainer.iteration == WARM:
            self.profiler.start()
        elif trainer.iteration == WARM + 1:
            torch.cuda.synchronize()
            self.profiler.stop()
            times = [
                (event.key, event.self_device_time_total)
                for event in self.profiler.key_averages()
                if event.device_type == torch.autograd.DeviceType.CUDA
            ]
            whole = sum(time for _, time in times) or 1.0
            for name, time in sorted(times, key=lambda item: -item[1])[:25]:
                print(f"{time / 1e3:10.2f} ms  {name[:100]}")
            for kind, time in by_kind(times).most_common():
                print(f"figure {kind} = {100 * time / whole:.1f}")


def main() -> None:
    run = prepare(parse_config(sys.argv[2:], prog="observe.py").config)
    trainer = build_trainer(run, initialize_distributed(run.config))
    trainer.callbacks.append({"waits": Waits, "kernels": Kernels}[sys.argv[1]]())
    trainer.train()


if __name__ == "__main__":
    main()
