"""Whether blocks that a part of the tokens goes through (Mixture of Depths) can be had."""

from __future__ import annotations

from megaforge.config.config import Config
from megaforge.config.depth_config import tokens_within
from megaforge.config.fields import either
from megaforge.config.pattern import blocks_of
from megaforge.errors import UserError


def check_depth(config: Config) -> None:
    """
    Raises:
        UserError: no block is chosen, one makes what later blocks read of every token, or the chosen tokens do not
            divide over the ranks that share a sequence.
    """
    model, length = config.model, config.data.seq_length
    capacity, blocks = model.mod_capacity_factor, blocks_of(model)
    if capacity is None:
        return
    if len(blocks) == 1:
        raise UserError(
            f"--mod-capacity-factor {capacity:g}: every token goes through the first block, and the model has no "
            "other; leave it out, or use more blocks"
        )
    if not any(block.capacity for block in blocks):
        raise UserError(
            f"--mod-every {model.mod_every}: it chooses blocks {model.mod_every}, {2 * model.mod_every}, ..., and the "
            f"model has {len(blocks)}; use --mod-every {len(blocks)} or less"
        )
    for place, block in enumerate(blocks):
        for kind in block.layers if block.first and block.capacity else ():
            if kind.carried(model, length, 1, 1):
                raise UserError(
                    f"--mod-every {model.mod_every}: block {place + 1} has the model's first {kind.title}, which makes "
                    "what later ones read of every token; use another --mod-every or put one in front"
                )
    unit, tokens = config.parallel.seq_len_divisor, tokens_within(capacity, length)
    if tokens % unit:
        near = {size for size in (tokens // unit * unit, -(-tokens // unit) * unit) if 0 < size <= length}
        raise UserError(
            f"--mod-capacity-factor {capacity:g}: {tokens} of --seq-length {length} tokens are not divisible by the "
            f"{unit} pieces into which --cp and --sequence-parallel cut a sequence; use --mod-capacity-factor "
            f"{either(f'{size / length:.6g}' for size in sorted(near))}"
        )
