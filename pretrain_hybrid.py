#!/usr/bin/env python3
"""Pretrains a hybrid model from a command line of Megatron-LM's ``pretrain_hybrid.py``: its flags, with a
``--hybrid-layer-pattern``, and its defaults where a line is silent (the preset ``megatron``).

Start one process a rank with torchrun, srun or mpirun; ``--help`` lists every flag.
"""

from __future__ import annotations

from megaforge.config.entry import run_entry


def main() -> int:
    from megaforge.pretrain import pretrain

    return pretrain("pretrain_hybrid.py", "Pretrain a hybrid model, with Megatron-LM's defaults.", as_megatron=True)


if __name__ == "__main__":
    run_entry(main)
