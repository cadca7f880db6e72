"""How much arithmetic a model is, per token and per block: what MFU, pipeline cuts and the planner count with."""

from __future__ import annotations

from collections.abc import Iterable

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import ahead_of, blocks_of
from megaforge.models.hybrid import HybridModel
from megaforge.nn.head import EMBEDDING
from megaforge.parallel.param_spec import ParamSpec, named_specs


def active_matmul_parameters(model: HybridModel) -> float:
    """Elements of the global matrices that one token is multiplied with, the mean over tokens where not all go through
    a block: of the experts the chosen ones; the embedding only where it is also the head, for looking a row up takes
    no product."""
    return matmul_elements((spec for spec, _ in named_specs(model)), model.cfg)


def matmul_elements(specs: Iterable[ParamSpec], cfg: ModelConfig) -> float:
    """:func:`active_matmul_parameters` of some parameters."""
    return sum((spec.codes_of or spec.numel) * spec.token_share * _active_share(spec, cfg) for spec in specs)


def _active_share(spec: ParamSpec, cfg: ModelConfig) -> float:
    multiplies = (
        spec.role == "matrix"
        or spec.codes_of
        or (spec.name == EMBEDDING and not cfg.untie_embeddings_and_output_weights)
    )
    if not multiplies:
        return 0.0
    return spec.active_share


def model_flops_per_token(model: HybridModel, sequence_length: int) -> float:
    """Floating-point operations of one token's forward and backward pass, recomputation not counted.

    Three times the forward pass (the backward pass does two products for each of its own), which is 2 for every active
    matrix element (:func:`active_matmul_parameters`) and what its layers do besides.
    """
    mixing = sum(block.flops(model.cfg, sequence_length) for block in blocks_of(model.cfg))
    more = head_products(model.cfg) + ahead_mixing(model.cfg, sequence_length)
    return 3.0 * (2.0 * active_matmul_parameters(model) + mixing + more)


def head_products(cfg: ModelConfig) -> float:
    """Forward FLOPs of one token's scores in all further predictions, which share the head's matrix."""
    return 2.0 * len(ahead_of(cfg)) * cfg.padded_vocab_size() * cfg.hidden_size


def ahead_mixing(cfg: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs of one token in the layers of further predictions, besides products with matrices."""
    return sum(
        kind.flops(cfg, sequence_length) for blocks in ahead_of(cfg) for block in blocks for kind in block.layers
    )


def ahead_flops(model: HybridModel, sequence_length: int) -> float:
    """Forward FLOPs of one token in all further predictions of a model with its last stage."""
    if model.mtp is None:
        return 0.0
    own = {spec.name: spec for spec, _ in named_specs(model.mtp)}
    own.pop(EMBEDDING, None)  # looked up
    cfg = model.cfg
    return 2.0 * matmul_elements(own.values(), cfg) + head_products(cfg) + ahead_mixing(cfg, sequence_length)
