"""How much arithmetic a model is, per token and per block: what MFU, pipeline cuts and the planner count with."""

from __future__ import annotations

from collections.abc import Iterable

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import BlockKind, blocks_of
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.param_spec import ParamSpec, named_specs


def active_matmul_parameters(model: HybridModel) -> float:
    """Elements of the global matrices that one token is multiplied with: of the experts the chosen ones; the
    embedding only where it is also the head, for looking a row up takes no product."""
    return matmul_elements((spec for spec, _ in named_specs(model)), model.cfg)


def matmul_elements(specs: Iterable[ParamSpec], cfg: ModelConfig) -> float:
    """:func:`active_matmul_parameters` of some parameters."""
    return sum(spec.numel * _active_share(spec, cfg) for spec in specs)


def _active_share(spec: ParamSpec, cfg: ModelConfig) -> float:
    elementwise = len(spec.shape) < 2 or spec.name.endswith(".r_k")
    looked_up = spec.kind == "embedding" and cfg.untie_embeddings_and_output_weights
    if elementwise or looked_up:
        return 0.0
    return cfg.moe_router_topk / cfg.num_experts if spec.kind == "moe" else 1.0


def mixing_flops(cfg: ModelConfig, block: BlockKind, sequence_length: int) -> float:
    """Forward FLOPs of one token's mixing with other tokens, besides the products with matrices.

    - attention: 2 * s * heads * head size, for scores and weighted values over s/2 earlier tokens on average
      (document boundaries make it less);
    - RWKV-7: 9 N^2 a head of size N: decay (1), removal (2 + 2), insertion (2) and reading (2) of its state in the
      recurrent form (Peng et al., arXiv 2503.14456); the chunked form does more, which does not count.
    """
    if block.mixer == "attention":
        return 2.0 * sequence_length * cfg.num_attention_heads * cfg.head_dim
    return 9.0 * cfg.hidden_size * cfg.rwkv_head_size


def model_flops_per_token(model: HybridModel, sequence_length: int) -> float:
    """Floating-point operations of one token's forward and backward pass, recomputation not counted.

    Three times the forward pass (the backward pass does two products for each of its own), which is 2 for every active
    matrix element (:func:`active_matmul_parameters`) and :func:`mixing_flops` of every block.
    """
    mixing = sum(mixing_flops(model.cfg, block, sequence_length) for block in blocks_of(model.cfg))
    return 3.0 * (2.0 * active_matmul_parameters(model) + mixing)
