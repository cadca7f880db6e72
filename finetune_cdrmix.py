#!/usr/bin/env python3
"""Fine-tunes a trained model: ``finetune_cdrmix.py --pretrained-checkpoint runs/base --data-path chat://train.jsonl
--valid-data-path valid.jsonl --peft lora --save runs/tuned``.

The model and its tokenizer are the checkpoint's. Flags are those of pretrain_cdrmix.py, with other defaults; without
``--peft`` all weights are trained. docs/finetuning.md has more.
"""

from __future__ import annotations

from megaforge.config.entry import run_entry
from megaforge.config.fine_tuning import DEFAULTS


def main() -> int:
    from megaforge.pretrain import pretrain

    return pretrain("finetune_cdrmix.py", "Fine-tune a trained model.", defaults=DEFAULTS)


if __name__ == "__main__":
    run_entry(main)
