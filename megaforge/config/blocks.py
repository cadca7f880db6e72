"""A model in one line: the first that a run says."""

from __future__ import annotations

from collections import Counter

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import ahead_of, blocks_of, kinds_of


def describe_blocks(model: ModelConfig) -> str:
    """Which blocks there are, and what shapes them: ``12 blocks: 12 x attention + dense FFN; ...``.

    Raises:
        UserError: see :func:`megaforge.config.pattern.parse_pattern`.
    """
    blocks = blocks_of(model)
    counts = Counter(" + ".join(kind.title.removesuffix(" layer") for kind in block.layers) for block in blocks)
    parts = [
        f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}: "
        + ", ".join(f"{n} x {one}" for one, n in counts.items()),
        f"width {model.hidden_size}",
        f"{model.activation}, {'with' if model.add_bias_linear else 'no'} biases",
        model.normalization,
    ]
    if ahead := ahead_of(model):
        each = ", ".join(" + ".join(kind.title.removesuffix(" layer") for kind in one.layers) for one in ahead[0])
        parts.append(f"{len(ahead)} further token{'s' if len(ahead) > 1 else ''} ({model.mtp_mode}), each by {each}")
    parts += [text for kind in kinds_of(model) if (text := kind.describe(model))]
    if taken := sum(block.capacity is not None for block in blocks):
        parts.append(f"{model.mod_capacity_factor:.4g} of the tokens through {taken} of the blocks")
    return "; ".join(parts)
