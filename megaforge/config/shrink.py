"""``--shrink N``: a preset of its own depth and layout, small enough to try on any machine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megaforge.config.fields import divisors
from megaforge.config.schema import settings
from megaforge.errors import UserError

_WIDTHS = (
    *("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "kv_channels"),
    *("rwkv_decay_rank", "rwkv_iclr_rank", "rwkv_value_rank", "rwkv_gate_rank"),
)
_HEADS = ("rwkv_head_size", "mamba_head_dim", "mamba_state_dim")
_LEAST_HEAD = 4  # channels of a head that is made of a wider one


def shrink(values: dict[str, Any], origins: dict[str, str], by: int, typed: Collection[str]) -> None:
    """Divides the model's widths; how many layers, heads, experts and words there are stays. What the line itself gives
    holds as it stands.

    Args:
        values, origins: of settings by key, changed in place.
        typed: the keys that stand on the command line.

    Raises:
        UserError: a width is not a multiple.
    """
    for name in (*_WIDTHS, *_HEADS):
        setting = settings()[f"model.{name}"]
        width = values.get(setting.key, setting.default)
        if by == 1 or width is None or setting.key in typed:
            continue
        if width % by:
            raise UserError(
                f"--shrink {by}: {setting.flag} {width} is not a multiple of it; use one of "
                f"{', '.join(map(str, divisors(width)[1:8]))}, or give {setting.flag} besides"
            )
        values[setting.key] = max(width // by, min(width, _LEAST_HEAD)) if name in _HEADS else width // by
        origins[setting.key] = f"--shrink {by} of {width} ({origins[setting.key]})"
