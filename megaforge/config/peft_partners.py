"""What the flags of fine-tuning need beside them."""

from __future__ import annotations

from dataclasses import fields

from megaforge.config.fields import either
from megaforge.config.plastic_config import PlasticConfig
from megaforge.config.prefix_config import PREFIXED
from megaforge.config.qlora_config import QLoraConfig
from megaforge.config.run_partners import Partner

_LORA = ("peft_from", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "lora_rank_pattern", "lora_bias")
_PLASTIC = tuple(f"model.{one.name}" for one in fields(PlasticConfig))

FINE_TUNING = (
    Partner(
        tuple(f"model.{name}" for name in _LORA),
        lambda c: c.model.has_adapters,
        "there are no adapters: add --peft lora",
    ),
    Partner(
        tuple(f"model.{field.name}" for field in fields(QLoraConfig)),
        lambda c: c.model.peft == "qlora",
        "no matrix is kept in 4 bits: add --peft qlora",
    ),
    Partner(("model.lora_rank_steps",), lambda c: c.model.has_adapters, "there are no adapters: add --peft lora"),
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
        ("model.prefix_length",),
        lambda c: c.model.peft in PREFIXED,
        f"there is no prefix: add --peft {either(PREFIXED)}",
    ),
    Partner(
        ("model.prefix_hidden_size",),
        lambda c: c.model.peft == "prefix",
        "nothing makes a prefix: add --peft prefix",
    ),
    Partner(
        ("model.peft",),
        lambda c: c.model.peft not in PREFIXED or c.parallel.context_parallel_size == 1,
        "every document has the prefix in front of it, on one rank: use --cp 1",
    ),
    Partner(
        ("model.peft",),
        lambda c: c.model.peft not in PREFIXED or not c.model.attention_dropout,
        "attention to a prefix is not dropped: use --attention-dropout 0",
    ),
    Partner(
        ("model.peft",),
        lambda c: c.model.peft != "state" or c.parallel.context_parallel_size == 1,
        "every document begins with the trained state, on one rank: use --cp 1",
    ),
    Partner(
        ("model.peft_targets",),
        lambda c: c.model.has_adapters or c.model.peft == "plastic",
        "there are no adapters: add --peft lora or --peft plastic",
    ),
    Partner(_PLASTIC, lambda c: c.model.peft == "plastic", "there are no fast weights: add --peft plastic"),
    Partner(
        ("model.peft",),
        lambda c: c.model.peft != "plastic" or not c.training.compile,
        "fast weights change between the pieces that would be compiled: leave --compile out",
    ),
    Partner(
        ("chat.chat_template", "chat.train_on_prompts"),
        lambda c: any(path.startswith("chat://") for path in c.data.data_path),
        "there are no conversations: give --data-path chat://FILE.jsonl",
    ),
)
