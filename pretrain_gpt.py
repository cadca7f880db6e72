#!/usr/bin/env python3
"""Pretrains a GPT from a command line of Megatron-LM's ``pretrain_gpt.py``: its flags, and its defaults where a line is
silent (the preset ``megatron``). The same trainer as ``pretrain_cdrmix.py``, whose flags all work here too.

Start one process a rank with torchrun, srun or mpirun; ``--help`` lists every flag.
"""

from __future__ import annotations

from megaforge.config.entry import run_entry


def main() -> int:
    from megaforge.pretrain import pretrain

    return pretrain("pretrain_gpt.py", "Pretrain a GPT, with Megatron-LM's defaults.", as_megatron=True)


if __name__ == "__main__":
    run_entry(main)
