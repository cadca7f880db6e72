#!/usr/bin/env python3
"""Pretrains a CDRmix model: ``pretrain_cdrmix.py --config cdrmix-tiny --data-path PREFIX --tokenizer-model FILE``.

Start one process a rank with torchrun, srun or mpirun; ``--help`` lists every flag.
"""

from __future__ import annotations

from megaforge.config.entry import run_entry


def main() -> int:
    # Mistakes are found in milliseconds; torch, which takes more than a second to import, comes after them.
    from megaforge.config.cli import parse_config
    from megaforge.config.launcher import check_address, discover_launch, print_rank_0
    from megaforge.resilience.requests import make_requests

    parsed = parse_config(prog="pretrain_cdrmix.py", description="Pretrain a CDRmix model.")
    config = parsed.config
    for note in parsed.notes:
        print_rank_0(note)
    if config.dry_run.dry_run:
        from megaforge.verification.dry_run import dry_run

        dry_run(config)
        return 0
    from megaforge.monitor.log import logged

    with logged(config.logging, discover_launch().rank):
        requests = make_requests(config)
        check_address(discover_launch())
        from megaforge.training.prepare import prepare

        run = prepare(config)

        from megaforge.parallel.distributed import shutdown
        from megaforge.training.setup import build_trainer, initialize_distributed

        trainer = build_trainer(run, initialize_distributed(run.config))
        requests.listen(announce=discover_launch().rank == 0)
        trainer.train(requests)
        shutdown()
        return 0


if __name__ == "__main__":
    run_entry(main)
