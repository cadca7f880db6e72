"""What the entry scripts share: a command line becomes a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaforge.config.cli import ParsedConfig
    from megaforge.config.config import Config
    from megaforge.models.prepared_run import PreparedRun
    from megaforge.planning.auto_layout import AutoLayout
    from megaforge.planning.elastic import ElasticLayout
    from megaforge.resilience.requests import Requests
    from megaforge.training.trainer import Trainer


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
    from megaforge.config.blocks import describe_blocks
    from megaforge.config.cli import parse_config
    from megaforge.config.launcher import check_address, discover_launch, end_with_torchrun, print_rank_0
    from megaforge.resilience.faults import arm
    from megaforge.resilience.leaving import check_requeue_status, nothing_left
    from megaforge.resilience.requests import make_requests

    parsed = parse_config(prog=prog, description=description, as_megatron=as_megatron, defaults=defaults)
    config = parsed.config
    said = (describe_blocks(config.model), *parsed.notes)
    chooser = _chooser(parsed)
    if config.dry_run.dry_run:
        for note in said:
            print_rank_0(note)
        from megaforge.verification.dry_run import dry_run

        dry_run(config, None if chooser is None else chooser.planned)
        return 0
    from megaforge.monitor.log import logged

    launch = discover_launch()
    end_with_torchrun()
    with logged(config.logging, launch.rank):
        check_requeue_status(config, launch)
        if (done := nothing_left(config)) is not None:
            print_rank_0(done)
            return 0
        requests = make_requests(config)
        check_address(launch)
        arm(launch.rank)
        from megaforge.training.prepare import prepare

        trainer = _train(prepare(config, said, chooser), chooser, requests, config)
        return 0 if trainer.complete else config.resilience.requeue_exit_code


def _train(run: PreparedRun, chooser: AutoLayout | ElasticLayout | None, requests: Requests, asked: Config) -> Trainer:
    """Trains until nothing is left, or ``requests`` ask for the end, and leaves a mark of which it was.

    Args:
        asked: the configuration as the command line has it.
    """
    from megaforge.config.launcher import this_launch
    from megaforge.parallel.distributed import shutdown
    from megaforge.resilience.leaving import mark, unmark
    from megaforge.training.setup import build_trainer, initialize_distributed
    from megaforge.training.watching import watched

    def advice() -> list[str]:
        from megaforge.planning.advice import memory_advice

        return memory_advice(run.config, run.layout.world_size)

    ctx, first = initialize_distributed(run.config), this_launch().rank == 0
    with watched(run.config, ctx) as watching:
        trainer = build_trainer(run, ctx, advice)
        if chooser is not None and chooser.why is not None:
            trainer.events.tell("layout", why=chooser.why)
        trainer.add(watching)
        requests.listen(announce=first)
        if first:
            unmark(asked)
        trainer.train(requests)
    if first:
        reason = trainer.stop_reason or "--train-iters is reached"
        mark(asked, trainer.iteration, reason, complete=trainer.complete)
    if trainer.complete and run.config.evaluation.evaluate_at_end:
        from megaforge.inference.at_end import evaluate_at_end

        evaluate_at_end(run.config)
    shutdown()
    return trainer


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
