#!/usr/bin/env python3
"""Pretrains a CDRmix model: ``pretrain_cdrmix.py --config cdrmix-tiny --data-path PREFIX --tokenizer-model FILE``.

Start one process a rank with torchrun, srun or mpirun; ``--help`` lists every flag.
"""

from __future__ import annotations

from megaforge.config.entry import run_entry


def main() -> int:
    from megaforge.pretrain import pretrain

    return pretrain("pretrain_cdrmix.py", "Pretrain a CDRmix model.")


if __name__ == "__main__":
    run_entry(main)
