"""The methods of ``--peft``: what each reads and needs. No torch; each names the converter that does it."""

from __future__ import annotations

from dataclasses import fields

from megaforge.config.adalora_config import AdaLoraConfig
from megaforge.config.config import Config
from megaforge.config.peft_method import PeftMethod
from megaforge.config.plastic_config import PlasticConfig
from megaforge.config.qlora_config import QLoraConfig

_RANKS = ("lora_rank_steps", "lora_rank_energy")
_LOW_RANK = ("peft_targets", "peft_from", "lora_rank", "lora_alpha", "lora_dropout", "lora_rank_pattern", "lora_bias")
_LORA = (*_LOW_RANK, "use_rslora", *_RANKS)


def _one_rank_of_cp(config: Config) -> bool:
    return config.parallel.context_parallel_size == 1


_OF_PREFIXES = (
    (_one_rank_of_cp, "every document has the prefix in front of it, on one rank: use --cp 1"),
    (
        lambda c: not c.model.attention_dropout,
        "attention to a prefix is not dropped: use --attention-dropout 0",
    ),
)

LORA = PeftMethod("megaforge.peft.lora:lora", _LORA, low_rank=True, peft_type="LORA")
QLORA = PeftMethod(
    "megaforge.peft.qlora:qlora",
    (*_LORA, *(one.name for one in fields(QLoraConfig))),
    low_rank=True,
    peft_type="LORA",
    replaces_weights=True,
)
ADALORA = PeftMethod(
    "megaforge.peft.adalora:adalora",
    (*_LOW_RANK, *(one.name for one in fields(AdaLoraConfig))),
    low_rank=True,
    peft_type="ADALORA",
    needs=(
        (
            lambda c: c.model.adalora_target_rank <= c.model.lora_rank,
            "ranks shrink to --adalora-target-rank: use at most --lora-rank",
        ),
    ),
)
BITFIT = PeftMethod("megaforge.peft.bitfit:bitfit")
PREFIX = PeftMethod(
    "megaforge.peft.prefix:prefix_tuning",
    ("prefix_length", "prefix_hidden_size"),
    peft_type="PREFIX_TUNING",
    needs=_OF_PREFIXES,
)
P_TUNING_V2 = PeftMethod(
    "megaforge.peft.prefix:p_tuning_v2", ("prefix_length", "peft_from"), peft_type="PREFIX_TUNING", needs=_OF_PREFIXES
)
STATE = PeftMethod(
    "megaforge.peft.state_tuning:state_tuning",
    needs=((_one_rank_of_cp, "every document begins with the trained state, on one rank: use --cp 1"),),
)
PLASTIC = PeftMethod(
    "megaforge.reasoning.plastic:plastic_lora",
    ("peft_targets", *(one.name for one in fields(PlasticConfig))),
    needs=(
        (
            lambda c: not c.training.compile,
            "fast weights change between the pieces that would be compiled: leave --compile out",
        ),
    ),
)
