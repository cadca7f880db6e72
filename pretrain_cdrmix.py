#!/usr/bin/env python3
"""Pretrains a CDRmix model: ``pretrain_cdrmix.py --config cdrmix-tiny --data-path PREFIX --tokenizer-model FILE``.

Start one process a rank with torchrun, srun or mpirun; ``--help`` lists every flag.
"""

from __future__ import annotations

from megaforge.config.cli import parse_config, run_entry
from megaforge.parallel.distributed import say_once, shutdown
from megaforge.training.dry_run import dry_run
from megaforge.training.launch import build_trainer, join, prepare


def main() -> int:
    parsed = parse_config(prog="pretrain_cdrmix.py", description="Pretrain a CDRmix model.")
    if parsed.config.dry_run.dry_run:
        dry_run(parsed.config)
        return 0
    config, layout, tokenizer = prepare(parsed.config)
    if config.name.startswith("cdrmix-reason"):
        say_once(f"{config.name}: this version trains stage A (pretraining) only; stage B is not part of it")
    trainer = build_trainer(config, layout, tokenizer, join(config))
    trainer.train()
    shutdown()
    return 0


if __name__ == "__main__":
    run_entry(main)
