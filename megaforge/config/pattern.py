"""Which sublayers a model has, in order: the hybrid layer pattern, written out or made by a schedule.

The letters are Megatron-LM's, with R for RWKV-7: R and * are mixers, E and - are FFNs, | cuts pipeline stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError

MIXERS = {"R": "rwkv7", "*": "attention"}
FFNS = {"E": "moe", "-": "dense"}
CUT = "|"
NOT_YET = {
    "M": "Mamba layers are not available",
    "/": "multi-token prediction blocks are not available",
}


@dataclass(frozen=True)
class BlockKind:
    """One block: its mixer (``rwkv7`` or ``attention``) and its FFN (``moe``, ``dense`` or None)."""

    mixer: str
    ffn: str | None

    @property
    def channel_mix(self) -> bool:
        """Whether the FFN's input is token-shifted: it is after an RWKV mixer."""
        return self.mixer == "rwkv7"


def parse_pattern(pattern: str) -> tuple[BlockKind, ...]:
    """Reads a pattern such as ``RERERE*E`` or ``RERE|RE*E``.

    Raises:
        UserError: it is empty, holds an unknown or unavailable letter, or has an FFN without a mixer before it.
    """
    flag = f"--hybrid-layer-pattern {pattern!r}"
    blocks: list[BlockKind] = []
    open_mixer = False
    for place, letter in enumerate(pattern):
        if letter in MIXERS:
            blocks.append(BlockKind(MIXERS[letter], None))
            open_mixer = True
        elif letter in FFNS:
            if not open_mixer:
                raise UserError(
                    f"{flag}: the FFN {letter!r} at position {place} has no mixer before it; "
                    f"write R{letter} or *{letter}"
                )
            blocks[-1] = BlockKind(blocks[-1].mixer, FFNS[letter])
            open_mixer = False
        elif letter == CUT:
            open_mixer = False
        elif letter in NOT_YET:
            raise UserError(
                f"{flag}: {letter!r} at position {place}: {NOT_YET[letter]} in this version; use R, *, E and -"
            )
        else:
            raise UserError(
                f"{flag}: unknown letter {letter!r} at position {place}; "
                "use R (RWKV-7), * (attention), E (mixture of experts), - (dense FFN) and | (pipeline cut)"
            )
    if not blocks:
        raise UserError(f"{flag}: holds no block; a small model is RERERE*E")
    _check_first_block(blocks, flag)
    return tuple(blocks)


def pipeline_cuts(cfg: ModelConfig) -> tuple[int, ...]:
    """How many blocks stand before each ``|`` of the pattern; empty: the cuts are chosen by cost."""
    before = layer_pattern(cfg).split(CUT)[:-1]
    counts = [sum(letter in MIXERS for letter in part) for part in before]
    return tuple(sum(counts[: number + 1]) for number in range(len(counts)))


def _check_first_block(blocks: list[BlockKind], flag: str) -> None:
    """RWKV-7's later layers use the first one's values (v_first), so it must come first."""
    if any(block.mixer == "rwkv7" for block in blocks) and blocks[0].mixer != "rwkv7":
        raise UserError(
            f"{flag}: the first mixer must be R when there is any R (it makes the values that the others use)"
        )


def attention_count(num_layers: int, transformer_pct: float) -> int:
    """How many of the blocks are attention: round(L * pct / 100)."""
    return round(num_layers * transformer_pct / 100)


def attention_positions(schedule: str, num_layers: int, count: int) -> tuple[int, ...]:
    """Block indices that are attention; block 0 never is one unless all are.

    ``interleave-x`` spreads them evenly, each at the end of its stretch (25 %: R R R *), ``top-of-x`` makes them the
    last blocks, ``hybrid`` puts half of them (rounded down) on top and spreads the others over the blocks below.

    Raises:
        UserError: an unknown schedule.
    """
    if schedule == "attention" or count >= num_layers:
        return tuple(range(num_layers))
    if schedule == "rwkv":
        return ()
    if schedule == "interleave-x":
        return _spread(num_layers, count)
    if schedule == "top-of-x":
        return tuple(range(num_layers - count, num_layers))
    if schedule == "hybrid":
        top = count // 2
        return (*_spread(num_layers - top, count - top), *range(num_layers - top, num_layers))
    raise UserError(
        f"--layer-schedule {schedule}: choose interleave-x, top-of-x, hybrid, attention (all) or rwkv (all RWKV-7)"
    )


def _spread(num_layers: int, count: int) -> tuple[int, ...]:
    """The last block of each of ``count`` stretches of nearly equal length; rounded up, so that block 0 is none."""
    return tuple(-(-(index + 1) * num_layers // count) - 1 for index in range(count))


def layer_pattern(cfg: ModelConfig) -> str:
    """The model's pattern: ``--hybrid-layer-pattern``, or the one that ``--layer-schedule`` makes."""
    if cfg.hybrid_layer_pattern is not None:
        return cfg.hybrid_layer_pattern
    count = attention_count(cfg.num_layers, cfg.transformer_pct)
    attention = set(attention_positions(cfg.layer_schedule, cfg.num_layers, count))
    ffn = {"moe": "E", "dense": "-"}[cfg.ffn]
    return "".join(("*" if index in attention else "R") + ffn for index in range(cfg.num_layers))


def blocks_of(cfg: ModelConfig) -> tuple[BlockKind, ...]:
    """The model's blocks in order.

    Raises:
        UserError: see :func:`parse_pattern`.
    """
    return parse_pattern(layer_pattern(cfg))
