"""Flags of parameter-efficient fine-tuning. They say what the model computes, so they are a part of its own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaforge.config.adalora_config import AdaLoraConfig
from megaforge.config.fields import flag
from megaforge.config.peft_method import PeftMethod
from megaforge.config.plastic_config import PlasticConfig
from megaforge.config.prefix_config import PrefixConfig
from megaforge.config.qlora_config import QLoraConfig
from megaforge.config.rank_config import RankConfig
from megaforge.errors import UserError
from megaforge.registry import PEFT_METHODS


@dataclass(frozen=True)
class PeftConfig(QLoraConfig, AdaLoraConfig, PrefixConfig, PlasticConfig, RankConfig):
    """What :class:`megaforge.config.model_config.ModelConfig` has of adapters."""

    peft: str | None = flag(
        None,
        "train a few new parameters, or a few of the model's, and leave all others as they are",
        choices=PEFT_METHODS,
    )
    peft_targets: tuple[str, ...] = flag(
        ("all-linear",),
        "--peft lora and plastic: which matrices get adapters: all-linear, kinds (attention, rwkv, mamba, ffn, moe), "
        "ends of their paths with * and ?, or names of other programs (q_proj, gate_proj, linear_qkv, ...)",
        metavar="PATTERN",
    )
    lora_rank: int = flag(16, "--peft lora: rank of each adapter", least=1, most=1 << 16)
    lora_alpha: float = flag(32.0, "--peft lora: an adapter's output is multiplied by alpha / rank", above=0)
    lora_dropout: float = flag(
        0.1, "--peft lora: share of an adapter's input that is dropped in training (not of experts')", least=0, below=1
    )
    use_rslora: bool = flag(False, "--peft lora: multiply by alpha / sqrt(rank) (arXiv 2312.03732)")
    lora_rank_pattern: tuple[str, ...] = flag(
        (), "--peft lora: other ranks of some: PATTERN=RANK, patterns as in --peft-targets", metavar="PATTERN=RANK"
    )
    lora_bias: str = flag("none", "--peft lora: biases that are trained too", choices=("none", "all", "lora_only"))

    peft_from: str | None = flag(
        None,
        "--peft lora, qlora, adalora, p_tuning_v2: begin with the adapters, or the prefix, of this folder, ours or one "
        "of Hugging Face's peft",
        metavar="DIR",
    )

    @property
    def adapter_dropout(self) -> float:
        """The rate of the model's adapters, where it has some."""
        return self.lora_dropout if self.has_adapters else 0.0

    @property
    def has_adapters(self) -> bool:
        """Whether adapters stand beside its matrices."""
        method = self.peft_method
        return method is not None and method.low_rank

    @property
    def replaces_weights(self) -> bool:
        """Whether ``--peft`` takes weights out of the model, which then need no memory to be built in."""
        method = self.peft_method
        return method is not None and method.replaces_weights

    @property
    def peft_method(self) -> PeftMethod | None:
        """What ``--peft`` stands for."""
        if self.peft is None:
            return None
        method: PeftMethod = PEFT_METHODS.get(self.peft)
        return method

    @property
    def lora_ranks(self) -> Mapping[str, int]:
        """``--lora-rank-pattern``, read.

        Raises:
            UserError: one is not of the form.
        """
        ranks = {}
        for text in self.lora_rank_pattern:
            name, _, rank = text.rpartition("=")
            if not name or not rank.isdecimal() or int(rank) < 1:
                raise UserError(
                    f"--lora-rank-pattern {text}: write PATTERN=RANK with a rank of at least 1, as q_proj=8"
                )
            ranks[name] = int(rank)
        return ranks

    def validate_peft(self) -> None:
        """
        Raises:
            UserError: naming the flag, its value and one that works.
        """
        if not self.peft_targets:
            raise UserError("--peft-targets: name at least one matrix, or all-linear")
        _ = self.lora_ranks
        self.validate_qlora()
        self.validate_adalora()
