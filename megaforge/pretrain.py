"""What the entry scripts share: a command line becomes a run."""

from __future__ import annotations


def pretrain(prog: str, description: str, as_megatron: bool = False) -> int:
    """Trains, or tries with ``--dry-run``, what the process's command line asks for; returns the exit status.

    Args:
        prog: the script's name, for messages.
        description: one line for ``--help``.
        as_megatron: Megatron-LM's defaults hold where the line is silent.

    Raises:
        UserError: the run cannot be as it is asked for.
    """
    # Mistakes are found in milliseconds; torch, which takes more than a second to import, comes after them.
    from megaforge.config.blocks import describe_blocks
    from megaforge.config.cli import parse_config
    from megaforge.config.launcher import check_address, discover_launch, print_rank_0
    from megaforge.resilience.faults import arm
    from megaforge.resilience.requests import make_requests

    parsed = parse_config(prog=prog, description=description, as_megatron=as_megatron)
    config = parsed.config
    said = (describe_blocks(config.model), *parsed.notes)
    if config.dry_run.dry_run:
        for note in said:
            print_rank_0(note)
        from megaforge.verification.dry_run import dry_run

        dry_run(config)
        return 0
    from megaforge.monitor.log import logged

    with logged(config.logging, discover_launch().rank):
        requests = make_requests(config)
        check_address(discover_launch())
        arm(discover_launch().rank)
        from megaforge.training.prepare import prepare

        run = prepare(config, said)

        from megaforge.parallel.distributed import shutdown
        from megaforge.training.setup import build_trainer, initialize_distributed
        from megaforge.training.watching import watched

        ctx = initialize_distributed(run.config)
        with watched(run.config, ctx) as watching:
            trainer = build_trainer(run, ctx)
            trainer.add(watching)
            requests.listen(announce=discover_launch().rank == 0)
            trainer.train(requests)
        shutdown()
        return 0
