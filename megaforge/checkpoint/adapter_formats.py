"""How ``peft`` writes adapters down, by its ``peft_type``: what is in ``adapter_config.json``, and the tensors' names
(behind ``base_model.model.``). Both are read and written here; which matrix of ours is meant is not known here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig


class Pair(NamedTuple):
    """The adapter of a matrix.

    Attributes:
        first, second: A [r, in] and B [out, r].
        scale: the factor on their product.
        values: what AdaLoRA has between them, [r], or None.
    """

    first: Tensor
    second: Tensor
    scale: float
    values: Tensor | None = None

    @property
    def inner(self) -> Tensor:
        """A with what is between it and B; in fp64 where that is something."""
        return self.first if self.values is None else self.first.double() * self.values.double()[:, None]


def as_one(pairs: list[Pair]) -> Pair:
    """One adapter in place of several beside one matrix, at the first one's scale."""
    scale = pairs[0].scale
    second = torch.cat([one.second * (one.scale / scale) for one in pairs], 1)
    values = [one.values for one in pairs if one.values is not None]
    return Pair(torch.cat([one.first for one in pairs]), second, scale, torch.cat(values) if values else None)


Written = tuple[dict[str, Tensor], dict[str, Any]]


class LowRankFormat:
    """Files of factors beside matrices.

    Attributes:
        peft_type: what ``adapter_config.json`` calls it.
        letters: the factors of a matrix, each ``MODULE.lora_LETTER``.
    """

    peft_type: str
    letters: str

    @abstractmethod
    def write(self, cfg: ModelConfig, pairs: Mapping[str, Pair], steps: int) -> Written:
        """The tensors, and what the configuration says, of the adapters of a run of ``steps`` by modules' names."""

    @abstractmethod
    def pair(self, config: Mapping[str, Any], module: str, found: Mapping[str, Tensor]) -> Pair:
        """That of a module, from its factors by their letters."""

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
        """By the names of modules; those of rank 0 are left out.

        Raises:
            ValueError: the tensors are not factors that belong together.
        """
        factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            module, _, letter = key.removesuffix(".weight").rpartition(".lora_")
            if len(letter) != 1 or letter not in self.letters or tensor.dim() != 2:
                raise ValueError(f"{key} is not a factor of an adapter")
            factors[module][letter] = tensor
        pairs = {}
        for module, found in factors.items():
            ranks = {found[letter].shape[letter == "B"] for letter in found}
            if found.keys() != {*self.letters} or len(ranks) != 1:
                raise ValueError(f"the factors of {module} do not belong together")
            if ranks != {0}:
                pairs[module] = self.pair(config, module, found)
        return pairs

    def described(self, cfg: ModelConfig, modules: Collection[str]) -> dict[str, Any]:
        """What every configuration has."""
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "lora_alpha": cfg.lora_alpha,
            "lora_dropout": cfg.lora_dropout,
            "bias": "none",
            "target_modules": sorted(modules),
            "init_lora_weights": True,
        }


class LoraFormat(LowRankFormat):
    """LoRA, rsLoRA."""

    peft_type, letters = "LORA", "AB"

    def write(self, cfg: ModelConfig, pairs: Mapping[str, Pair], steps: int) -> Written:
        ranks, alphas, tensors = {}, {}, {}
        for name, pair in pairs.items():
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair.first, pair.second
            rank = pair.first.shape[0]
            alpha = pair.scale * (math.sqrt(rank) if cfg.use_rslora else rank)
            if rank != cfg.lora_rank:
                ranks[name] = rank
            if not math.isclose(alpha, cfg.lora_alpha):
                alphas[name] = alpha
        of_ranks = {"r": cfg.lora_rank, "use_rslora": cfg.use_rslora, "rank_pattern": ranks, "alpha_pattern": alphas}
        return tensors, self.described(cfg, pairs) | of_ranks

    def pair(self, config: Mapping[str, Any], module: str, found: Mapping[str, Tensor]) -> Pair:
        alpha, rank = config.get("alpha_pattern", {}), found["A"].shape[0]
        named = next((value for name, value in alpha.items() if module == name or module.endswith(f".{name}")), None)
        chosen = config.get("lora_alpha", 8) if named is None else named
        scale = float(chosen) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return Pair(found["A"], found["B"], scale)


class AdaLoraFormat(LowRankFormat):
    """AdaLoRA: triplets whose singular value is zero are left out, as ``peft`` does it."""

    peft_type, letters = "ADALORA", "ABE"

    def write(self, cfg: ModelConfig, pairs: Mapping[str, Pair], steps: int) -> Written:
        tensors, remain = {}, {}
        first_rank = max(pair.first.shape[0] for pair in pairs.values())  # of all adapters there, and in their scale
        for name, pair in pairs.items():
            assert pair.values is not None
            kept, factor = pair.values != 0, pair.scale / self.scale(cfg.lora_alpha, first_rank)
            values = pair.values[kept, None] * factor
            for letter, factors in zip("ABE", (pair.first[kept], pair.second[:, kept], values), strict=True):
                tensors[f"{name}.lora_{letter}"] = factors.contiguous()
            remain[f"{name}.lora_E"] = [*kept.tolist(), *[False] * (first_rank - len(kept))]
        of_ranks = {
            "init_r": first_rank,
            "target_r": cfg.adalora_target_rank,
            "tinit": int(steps * cfg.adalora_warmup_fraction),
            "tfinal": int(steps * cfg.adalora_final_fraction),
            "deltaT": cfg.adalora_interval,
            "beta1": cfg.adalora_beta1,
            "beta2": cfg.adalora_beta2,
            "orth_reg_weight": cfg.adalora_orthogonality,
            "total_step": steps,
            "rank_pattern": remain,
        }
        return tensors, self.described(cfg, pairs) | of_ranks

    def pair(self, config: Mapping[str, Any], module: str, found: Mapping[str, Tensor]) -> Pair:
        first_rank = int(config.get("init_r", 12))
        return Pair(
            found["A"], found["B"], self.scale(float(config.get("lora_alpha", 8)), first_rank), found["E"].view(-1)
        )

    def scale(self, alpha: float, first_rank: int) -> float:
        """``peft``'s."""
        return alpha / (first_rank + 1e-5)


LOW_RANK_FORMATS: Mapping[str, LowRankFormat] = {one.peft_type: one for one in (LoraFormat(), AdaLoraFormat())}
