"""A model in one line: the first that a run says."""

from __future__ import annotations

from collections import Counter

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of, kinds_of
from megaforge.registry import LAYER_KINDS


def describe_blocks(model: ModelConfig) -> str:
    """Which blocks there are, and what shapes them: ``12 blocks: 12 x attention + dense FFN; ...``.

    Raises:
        UserError: see :func:`megaforge.config.pattern.parse_pattern`.
    """
    blocks = blocks_of(model)
    counts = Counter(" + ".join(kind.title.removesuffix(" layer") for kind in block.layers) for block in blocks)
    kinds = kinds_of(model)
    parts = [
        f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}: "
        + ", ".join(f"{n} x {one}" for one, n in counts.items()),
        f"width {model.hidden_size}",
        f"{model.activation}, {'with' if model.add_bias_linear else 'no'} biases",
        model.normalization,
    ]
    if "E" in LAYER_KINDS and LAYER_KINDS.get("E") in kinds:
        parts.insert(2, f"{model.num_experts} experts, {model.moe_router_topk} a token")
    if "*" in LAYER_KINDS and LAYER_KINDS.get("*") in kinds:
        parts.append(f"positions {model.position_embedding_type}")
    return "; ".join(parts)
