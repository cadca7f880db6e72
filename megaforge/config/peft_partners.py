"""What the flags of fine-tuning need beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

from megaforge.config.config import Config
from megaforge.config.fields import either
from megaforge.config.peft_method import PeftMethod
from megaforge.config.run_partners import Partner
from megaforge.registry import PEFT_METHODS

FINE_TUNING = (
    Partner(
        ("model.lora_rank_steps",),
        lambda c: c.checkpoint.pretrained_checkpoint,
        "there is no base whose gradients would choose: add --pretrained-checkpoint DIR",
    ),
    Partner(
        ("model.lora_rank_energy",),
        lambda c: c.model.lora_rank_steps,
        "ranks are given: add --lora-rank-steps N",
    ),
    Partner(
        ("model.peft_from",),
        lambda c: c.checkpoint.pretrained_checkpoint,
        "adapters stand beside a base: add --pretrained-checkpoint DIR",
    ),
    Partner(
        ("chat.chat_template", "chat.train_on_prompts"),
        lambda c: any(path.startswith("chat://") for path in c.data.data_path),
        "there are no conversations: give --data-path chat://FILE.jsonl",
    ),
)


def method_partners(config: Config) -> Iterator[Partner]:
    """Flags that some methods of ``--peft`` read, for another one, and what the chosen one needs."""
    readers: dict[str, list[str]] = {}
    for name in PEFT_METHODS.names():
        method: PeftMethod = PEFT_METHODS.get(name)
        for setting in method.settings:
            readers.setdefault(setting, []).append(name)
    for setting, names in readers.items():
        text = f"a method of --peft reads it that is not chosen: add --peft {either(names)}"
        yield Partner((f"model.{setting}",), partial(_is_of, names), text)
    chosen = config.model.peft_method
    for needs, text in () if chosen is None else chosen.needs:
        yield Partner(("model.peft",), needs, text)


def _is_of(names: Collection[str], config: Config) -> bool:
    return config.model.peft in names
