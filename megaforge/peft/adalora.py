"""``--peft adalora`` (Zhang et al., arXiv 2303.10512): adapters in the form of a singular value decomposition,
``y = x W^T + alpha / (rank + 1e-5) * (x (E A)^T) B^T``, of whose triplets (a value of E with its row of A and its
column of B) fewer and fewer remain (:mod:`megaforge.training.triplets`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Constant, Normal
from megaforge.parallel.layers import Linear
from megaforge.parallel.mappings import copy_to_tensor_parallel
from megaforge.peft.adapter import Adapter, Declaration, Factors
from megaforge.peft.lora import adapters, lora

_STD = 0.02  # of A and B at first, as peft has it
VALUES = "E"  # the letter of singular values, as in peft's files
_MEANS = 2  # that Triplets keeps of each parameter


class SingularAdapter(Adapter):
    """An :class:`Adapter` with singular values between A and B: ``E`` [r, 1], or [experts, r, 1], zero at first. They
    multiply the rows of A, so that E's gradient is complete where A's is, but where ranks have parts of A's rows."""

    def declarations(self, layer: Linear, factors: Factors) -> Mapping[str, Declaration]:
        (first, _, of_first), (second, _, of_second) = super().declarations(layer, factors).values()
        values = (*first[:-1], 1)
        if len(first) == 3:
            of_values = {name: of_first[name] for name in ("expert_dim", "shard_axis")}
        else:
            of_values = {"tp_partial_grad": self.splits_input or of_first["tp_partial_grad"]}
        return {
            "A": (first, Normal(_STD), {"means": _MEANS, **of_first}),
            "B": (second, Normal(_STD), {"means": _MEANS, **of_second}),
            VALUES: (values, Constant(0.0), {"means": _MEANS, **of_values}),
        }

    def pair(self, factors: Factors) -> tuple[Tensor, Tensor]:
        first, second = super().pair(factors)
        values: Tensor = self.values(factors)
        if self.etp is not None and self.splits_input:  # a stack over ep cannot be declared partial
            values = copy_to_tensor_parallel(values, self.etp)
        return first * values, second

    def values(self, factors: Factors) -> nn.Parameter:
        """E of this rank."""
        found: nn.Parameter = getattr(self, f"{factors.prefix}{VALUES}")
        return found


def adalora(model: nn.Module, ctx: ParallelContext) -> None:
    """The converter.

    Raises:
        UserError: as of :func:`megaforge.peft.lora.lora`.
    """
    lora(model, ctx, SingularAdapter, scale_of)


def scale_of(cfg: ModelConfig, rank: int) -> float:
    """The factor on an adapter's output, by the rank that it begins with."""
    return cfg.lora_alpha / (rank + 1e-5)


def singular_factors(model: nn.Module) -> Iterator[tuple[SingularAdapter, Factors]]:
    """Every matrix's adapter of a model."""
    for _, _, adapter in adapters(model):
        if isinstance(adapter, SingularAdapter):
            for factors in adapter.factors:
                yield adapter, factors
