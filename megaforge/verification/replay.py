"""A step of a run made once more, from the nearest checkpoint before it, and compared with what the run wrote then."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaforge.checkpoint.checkpoint import read_meta
from megaforge.checkpoint.directory import list_steps
from megaforge.checkpoint.manifest import read_manifest
from megaforge.config.checkpoint_config import CheckpointConfig
from megaforge.config.config import Config
from megaforge.config.launcher import discover_launch
from megaforge.config.run_config import LoggingConfig
from megaforge.config.schema import config_from_dict
from megaforge.data.skip_list import read_skips
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.monitor.compare_digests import first_difference, read_digests
from megaforge.monitor.sinks import read_metrics
from megaforge.parallel.context import ParallelContext
from megaforge.training.callbacks import Callback, Place
from megaforge.training.digests import Digests
from megaforge.training.metrics import StepMetrics
from megaforge.training.prepare import prepare
from megaforge.training.replay_file import REPLAY
from megaforge.training.setup import build_trainer, initialize_distributed
from megaforge.training.trainer import Trainer


class _UpTo(Callback):
    """Ends the run after one step, without an evaluation, and keeps its numbers."""

    place = Place.RECORD

    def __init__(self, step: int) -> None:
        self.step, self.found = step, dict[str, float | int]()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.iteration == self.step:
            self.found, trainer.interrupted = metrics.values(), True
            trainer.stop("the step is repeated")


def replay(
    run: Path,
    step: int,
    *,
    skipped: bool = False,
    context: Callable[[Config], ParallelContext] = initialize_distributed,
) -> int:
    """Makes step ``step`` of the run that saved to ``run`` again and prints its numbers; on all ranks, as many as the
    run had, to the bit. Nothing is written.

    Args:
        skipped: the step that the run undid after a spike, or left out, with the batch that it had then.

    Returns:
        1 where the run's records of that step say something else, else 0.

    Raises:
        UserError: there is no checkpoint, or the run cannot be made from it.
    """
    start, newest = _checkpoints(run, step)
    saved = config_from_dict(read_meta(newest)["config"], str(newest))
    _check_ranks(newest)
    config = _to_repeat(saved, start)
    trainer = build_trainer(prepare(config), context(config))
    if skipped:
        trainer.data.take_back()
        trainer.data.leave_out(_left_out_then(run, step))
    elif start is None:
        trainer.data.leave_out(read_skips(run))
    upto, began = _UpTo(step), trainer.iteration
    with tempfile.TemporaryDirectory() as folder:
        digests = Path(folder) / "digests.jsonl"
        trainer.add(Digests(step, digests, config.parallel.sequence_parallel))
        trainer.add(upto)
        trainer.train()
        ours = read_digests(digests)[step] if digests.exists() else None
    if not upto.found:
        raise UserError(f"--step {step}: the run ended at iteration {trainer.iteration} ({trainer.stop_reason})")
    if not trainer.ctx.is_first_rank:
        return 0
    where = f"from {start.name}" if start is not None else "from the beginning"
    numbers = f"loss {upto.found['loss']!r}, gradient norm {upto.found['grad_norm']!r}"
    print(f"iteration {step}, {where} ({step - began} steps): {numbers}")
    if ours is None or skipped:
        return 0
    apart = _compare_metrics(saved, step, upto.found), _compare_digests(saved, run, step, ours)
    return max(apart)


def _checkpoints(run: Path, step: int) -> tuple[Path | None, Path]:
    """The newest checkpoint before ``step`` (None: the run's beginning is), and the one that tells the flags."""
    there = list_steps(run) if run.is_dir() else []
    if not there:
        raise UserError(f"{run} holds no checkpoint of a run: name its --save directory")
    before = [path for number, path in sorted(there) if number < step]
    return (before[-1], before[-1]) if before else (None, min(there)[1])


def _check_ranks(path: Path) -> None:
    then, now = dict(read_manifest(path).layout)["world"], discover_launch().world_size
    if then != now:
        raise UserError(
            f"{path} was written by {then} rank{'s' * (then > 1)}, and {now} {'were' if now > 1 else 'was'} started: "
            f"start it with torchrun --nproc-per-node {then} (all in all), as other sums differ in their last bits"
        )


def _to_repeat(config: Config, start: Path | None) -> Config:
    """``config`` of a run that goes on from ``start``, writes nothing and does not end by itself."""
    return dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(load=None if start is None else str(start)),
        logging=LoggingConfig(log_interval=config.logging.log_interval),
        training=dataclasses.replace(config.training, exit_interval=0, exit_duration_in_mins=None),
        length=dataclasses.replace(config.length, exit_interval_epochs=None),
        resilience=dataclasses.replace(config.resilience, spike_rollback=0, snapshot_interval=None),
    )


def _left_out_then(run: Path, step: int) -> list[list[int]]:
    file = run / REPLAY / f"step_{step:07d}.json"
    try:
        told = parse_json(file.read_bytes())
        return [[int(first), int(stop)] for first, stop in told["skipped"]]
    except OSError as error:
        raise UserError(f"--skipped: {file} cannot be read ({error.strerror}): no such step was left out") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--skipped: {file} is not the file of a step that was left out") from error


def _compare_metrics(config: Config, step: int, found: dict[str, float | int]) -> int:
    file = config.logging.metrics_file
    if file is None or not Path(file).is_file():
        return 0
    rows = [row for row in read_metrics(file) if row["kind"] == "step" and row["iteration"] == step]
    if not rows:
        return 0
    apart = [name for name in ("loss", "grad_norm") if rows[-1].get(name) not in (found[name], None)]
    for name in apart:
        print(f"{file}: {name} was {rows[-1][name]!r} then")
    if not apart:
        print(f"{file}: the same to the bit")
    return int(bool(apart))


def _compare_digests(config: Config, run: Path, step: int, ours: dict[str, Any]) -> int:
    if not config.logging.digest_interval:
        return 0
    theirs = read_digests(config.logging.digest_file or run).get(step)
    if theirs is None:
        return 0
    parting = first_difference({step: theirs}, {step: ours})
    if parting is None:
        print("digests of activations, gradients and weights: equal")
        return 0
    print(f"digests: {parting.part} of {parting.name} differ, and {parting.others} more of them")
    return 1
