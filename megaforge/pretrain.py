"""What the entry scripts share: a command line becomes a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaforge.config.cli import ParsedConfig
    from megaforge.config.config import Config
    from megaforge.config.launcher import Launch
    from megaforge.models.prepared_run import PreparedRun
    from megaforge.planning.auto_layout import AutoLayout
    from megaforge.planning.elastic import ElasticLayout
    from megaforge.resilience.requests import Requests


@dataclass(frozen=True)
class Stage:
    """A stage of a run, which most have one of.

    Attributes:
        parsed: its configuration as the command line has it.
        completed: the mark that says below ``--save`` that it is complete.
        chooser: what chooses its layout, or its micro-batch; None where they are given.
    """

    parsed: ParsedConfig
    completed: str
    chooser: AutoLayout | ElasticLayout | None

    @property
    def config(self) -> Config:
        """Its configuration."""
        return self.parsed.config


def pretrain(prog: str, description: str, as_megatron: bool = False, defaults: Mapping[str, Any] | None = None) -> int:
    """Trains, or tries with ``--dry-run``, what the process's command line asks for; returns the exit status.

    Args:
        prog: the script's name, for messages.
        description: one line for ``--help``.
        as_megatron: Megatron-LM's defaults hold where the line is silent.
        defaults: others that hold there.

    Raises:
        UserError: the run cannot be as it is asked for.
    """
    # Mistakes are found in milliseconds; torch, which takes more than a second to import, comes after them.
    from megaforge.config.cli import parse_stages
    from megaforge.config.launcher import check_address, discover_launch, end_with_torchrun, print_rank_0
    from megaforge.resilience.faults import arm
    from megaforge.resilience.leaving import COMPLETED, STAGE_A_COMPLETED, check_requeue_status
    from megaforge.resilience.requests import make_requests

    lines = parse_stages(prog=prog, description=description, as_megatron=as_megatron, defaults=defaults)
    marks = (COMPLETED,) if len(lines) == 1 else (STAGE_A_COMPLETED, COMPLETED)
    stages = [Stage(line, mark, _chooser(line)) for line, mark in zip(lines, marks, strict=True)]
    config = stages[0].config
    if config.dry_run.dry_run:
        for number, stage in enumerate(stages):
            _dry_run(stage, _title(number, stages))
        return 0
    from megaforge.monitor.log import logged

    launch = discover_launch()
    end_with_torchrun()
    with logged(config.logging, launch.rank):
        check_requeue_status(config, launch)
        if not (left := _left(stages)):
            return 0
        requests = make_requests(config)
        check_address(launch)
        arm(launch.rank)
        from megaforge.training.prepare import prepare

        runs = []
        for stage in left:  # what is wrong with the second is said before the first takes its weeks
            if len(stages) > 1:
                print_rank_0(_title(stages.index(stage), stages))
            runs.append(prepare(stage.config, _said(stage), stage.chooser))
        complete = _train_stages(stages, left, runs, requests, launch)
        return 0 if complete else config.resilience.requeue_exit_code


def _title(number: int, stages: Sequence[Stage]) -> str:
    return f"stage {'AB'[number]}:" if len(stages) > 1 else ""


def _said(stage: Stage) -> tuple[str, ...]:
    """What is to be told of it."""
    from megaforge.config.blocks import describe_blocks

    return (describe_blocks(stage.config.model), *stage.parsed.notes)


def _dry_run(stage: Stage, title: str) -> None:
    from megaforge.config.launcher import print_rank_0

    for note in (title, *_said(stage)) if title else _said(stage):
        print_rank_0(note)
    from megaforge.verification.dry_run import dry_run

    chooser = stage.chooser
    dry_run(stage.config, None if chooser is None else chooser.planned)


def _left(stages: Sequence[Stage]) -> list[Stage]:
    """Those of which something is left to do; says what is not."""
    from megaforge.config.launcher import print_rank_0
    from megaforge.resilience.leaving import nothing_left

    left: list[Stage] = []
    for stage in stages:
        done = nothing_left(stage.config, stage.completed)
        if done is None or left:
            left.append(stage)
        else:
            print_rank_0(done)
    return left


def _train_stages(
    stages: Sequence[Stage], left: Sequence[Stage], runs: Sequence[PreparedRun], requests: Requests, launch: Launch
) -> bool:
    """Trains the stages that are ``left`` one after the other, as long as each is complete, and leaves marks of how
    that ended: of each stage, and below the first one's ``--save`` of them all.

    Returns:
        Whether nothing is left to do.
    """
    from megaforge.config.launcher import print_rank_0
    from megaforge.resilience.leaving import COMPLETED, UNFINISHED, mark, unmark

    whole, first = stages[0].config, launch.rank == 0
    if first:
        unmark(whole, (COMPLETED, UNFINISHED))
    complete = True
    for stage, run in zip(left, runs, strict=True):
        if len(stages) > 1:
            print_rank_0(f"{_title(stages.index(stage), stages)} training")
        iteration, reason, complete = _train(run, stage, requests, first)
        if not complete:
            break
    if first and len(stages) > 1:
        mark(whole, iteration, reason, complete=complete)
    return complete


def _train(run: PreparedRun, stage: Stage, requests: Requests, first: bool) -> tuple[int, str, bool]:
    """Trains until nothing is left, or ``requests`` ask for the end, and leaves a mark of which it was.

    Args:
        first: whether this is rank 0.

    Returns:
        The last iteration, why it was the last, and whether nothing is left to do.
    """
    from megaforge.parallel.distributed import shutdown
    from megaforge.resilience.leaving import mark, unmark
    from megaforge.training.setup import build_trainer, initialize_distributed
    from megaforge.training.watching import watched

    def advice() -> list[str]:
        from megaforge.planning.advice import memory_advice

        return memory_advice(run.config, run.layout.world_size)

    asked, chooser = stage.config, stage.chooser
    ctx = initialize_distributed(run.config)
    with watched(run.config, ctx) as watching:
        trainer = build_trainer(run, ctx, advice)
        if chooser is not None and chooser.why is not None:
            trainer.events.tell("layout", why=chooser.why)
        trainer.add(watching)
        requests.listen(announce=first)
        if first:
            unmark(asked)
        trainer.train(requests)
    reason = trainer.stop_reason or "--train-iters is reached"
    if first:
        mark(asked, trainer.iteration, reason, complete=trainer.complete, completed=stage.completed)
    if trainer.complete and run.config.evaluation.evaluate_at_end:
        from megaforge.inference.at_end import evaluate_at_end

        evaluate_at_end(run.config)
    shutdown()
    return trainer.iteration, reason, trainer.complete


def _chooser(parsed: ParsedConfig) -> AutoLayout | ElasticLayout | None:
    """What chooses the layout, or the micro-batch; None where they are given."""
    from megaforge.config.micro_batch_config import AUTO

    config = parsed.config
    if config.parallel.layout == "auto":
        from megaforge.config.layout_settings import given_settings
        from megaforge.planning.auto_layout import AutoLayout

        return AutoLayout(given_settings(parsed.origins), parsed.origins)
    if config.resilience.elastic is not None and not config.dry_run.dry_run:
        from megaforge.planning.elastic import ElasticLayout

        return ElasticLayout(parsed.origins)
    if config.training.micro_batch_size == AUTO:
        from megaforge.planning.auto_micro_batch import AutoMicroBatch

        return AutoMicroBatch(parsed.origins)
    return None
