"""Which parameters a configuration has, and how many per component, without building them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import ParamSpec, named_specs

COMPONENTS = {
    "embedding": "embedding",
    "rwkv": "RWKV-7 mixers, channel mixes",
    "mamba": "Mamba-2 mixers",
    "attention": "attention",
    "moe": "experts",
    "router": "routers",
    "ffn": "dense FFN",
    "mtp": "multi-token projections",
    "norm": "norms",
    "head": "output head",
    "adapter": "adapters",
    "other": "other layers",
}


@dataclass(frozen=True)
class ComponentCount:
    """One component: ``tensors`` parameters of ``stored`` elements, of which a token uses ``active``."""

    component: str
    tensors: int
    stored: int
    active: int


def active_elements(spec: ParamSpec) -> int:
    """How many elements of a parameter take part in one token: of expert stacks the chosen ones, else all; of a block
    that not all tokens go through, their share of it.

    The whole embedding counts, as is usual, though a token looks up one row.
    """
    whole = spec.codes_of or spec.numel
    chosen = whole if spec.expert_dim is None else whole * spec.experts_per_token // spec.shape[spec.expert_dim]
    return round(chosen * spec.token_share)


@lru_cache(maxsize=8)
def declared_parameters(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The declaration of every parameter of the whole model by global name; allocates nothing."""
    model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta")))
    return {spec.name: spec for spec, _ in named_specs(model)}


def count_parameters(cfg: ModelConfig) -> list[ComponentCount]:
    """Counts by component, in the order of :data:`COMPONENTS`; a tied head is counted once, as the embedding.

    Raises:
        UserError: the configuration cannot be built.
    """
    specs = declared_parameters(cfg).values()
    counts = []
    for kind, component in COMPONENTS.items():
        own = [spec for spec in specs if spec.kind == kind]
        if own:
            stored, active = sum(s.codes_of or s.numel for s in own), sum(active_elements(s) for s in own)
            counts.append(ComponentCount(component, len(own), stored, active))
    missing = sorted({spec.kind for spec in specs} - COMPONENTS.keys())
    if missing:
        raise ValueError(f"parameters of unknown kind: {missing}")
    return counts


def total(counts: list[ComponentCount]) -> ComponentCount:
    """The sum of all components."""
    return ComponentCount(
        "total", sum(c.tensors for c in counts), sum(c.stored for c in counts), sum(c.active for c in counts)
    )
