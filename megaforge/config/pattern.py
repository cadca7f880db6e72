"""Which layers a model has, in order: the hybrid layer pattern, written out or made by a schedule.

The letters are Megatron-LM's, with R for RWKV-7: R, M and * are mixers, E and - are FFNs, | cuts pipeline stages, and
each / begins the layers of a further prediction (multi-token prediction). More of them are registered by name
(:class:`megaforge.config.layer_kind.LayerKind`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megaforge.config.depth_config import tokens_within
from megaforge.config.layer_kind import LayerKind
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.registry import LAYER_KINDS

CUT, AHEAD = "|", "/"


@dataclass(frozen=True)
class BlockKind:
    """One block: its mixer, its FFN if it has one, and whether no earlier block has such a mixer. An FFN with no mixer
    in front of it is a block of its own, in the mixer's place.

    ``capacity`` is the share of each sequence's tokens that go through it (Mixture of Depths); None: all of them.
    """

    mixer: LayerKind
    ffn: LayerKind | None
    first: bool = False
    capacity: float | None = None

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        return (self.mixer,) if self.ffn is None else (self.mixer, self.ffn)

    @property
    def style(self) -> str:
        """Its name in :data:`megaforge.registry.BLOCKS`."""
        return "plain" if self.capacity is None else "mixture_of_depths"

    def tokens(self, length: int) -> int:
        """How many of a sequence's ``length`` tokens go through it in training."""
        return length if self.capacity is None else tokens_within(self.capacity, length)

    def flops(self, cfg: ModelConfig, sequence_length: int) -> float:
        """Forward FLOPs of its layers besides the products with trained matrices, on all ranks together, of one token:
        the mean over a sequence's, those included that pass it by."""
        taken = self.tokens(sequence_length)
        return sum(kind.flops(cfg, taken) for kind in self.layers) * taken / sequence_length


def parse_pattern(pattern: str) -> tuple[BlockKind, ...]:
    """Reads a pattern such as ``RERERE*E`` or ``RERE|RE*E``, what stands behind a ``/`` left out.

    Raises:
        UserError: it is empty, holds an unknown or unavailable letter, or a layer where such a layer cannot be.
    """
    flag = f"--hybrid-layer-pattern {pattern!r}"
    blocks: list[BlockKind] = []
    places: dict[LayerKind, list[int]] = {}
    open_mixer = False
    for place, letter in enumerate(pattern.partition(AHEAD)[0]):
        if letter == CUT:
            open_mixer = False
            continue
        kind = _kind(letter, place, flag)
        if open_mixer and not kind.is_mixer:
            blocks[-1] = replace(blocks[-1], ffn=kind)
        else:
            blocks.append(BlockKind(kind, None, kind not in places))
        places.setdefault(kind, []).append(len(blocks) - 1)
        open_mixer = kind.is_mixer
    if not blocks:
        raise UserError(f"{flag}: holds no block; a small model is RERERE*E")
    for kind, where in places.items():
        kind.check_places(where, flag)
    return tuple(blocks)


def _kind(letter: str, place: int, flag: str) -> LayerKind:
    if letter in LAYER_KINDS:
        kind: LayerKind = LAYER_KINDS.get(letter)
        return kind
    known = ", ".join(f"{name} ({LAYER_KINDS.get(name).title})" for name in LAYER_KINDS.names())
    raise UserError(
        f"{flag}: unknown letter {letter!r} at position {place}; use {known}, | (pipeline cut) and / "
        "(further predictions)"
    )


def pipeline_cuts(cfg: ModelConfig) -> tuple[int, ...]:
    """How many blocks stand before each ``|`` of the pattern; empty: the cuts are chosen by cost."""
    pattern = layer_pattern(cfg).partition(AHEAD)[0]
    places = [place for place, letter in enumerate(pattern) if letter == CUT]
    return tuple(_count(pattern[:place]) for place in places)


def _count(pattern: str) -> int:
    """How many blocks a pattern has; its letters are known to be right."""
    mixes = [letter != CUT and LAYER_KINDS.get(letter).is_mixer for letter in pattern]
    within = [not mixed and place > 0 and mixes[place - 1] for place, mixed in enumerate(mixes)]
    return sum(letter != CUT and not inside for letter, inside in zip(pattern, within, strict=True))


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


@lru_cache(maxsize=64)
def blocks_of(cfg: ModelConfig) -> tuple[BlockKind, ...]:
    """The model's blocks in order.

    Raises:
        UserError: see :func:`parse_pattern`.
    """
    blocks = parse_pattern(layer_pattern(cfg))
    return tuple(replace(block, capacity=cfg.capacity_of(place)) for place, block in enumerate(blocks))


def kinds_of(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kinds of layer that the model has, each once, in the order in which it has them first.

    Raises:
        UserError: see :func:`parse_pattern` and :func:`ahead_of`.
    """
    blocks = (*blocks_of(cfg), *(block for blocks in ahead_of(cfg) for block in blocks))
    return tuple(dict.fromkeys(kind for block in blocks for kind in block.layers))


@lru_cache(maxsize=64)
def ahead_of(cfg: ModelConfig) -> tuple[tuple[BlockKind, ...], ...]:
    """The blocks of each further prediction, of the second token after each, of the third, ...: what stands behind each
    ``/`` of the pattern, or blocks like the model's last. Each is a model of its own, whose first blocks are first.

    Raises:
        UserError: the parts behind the ``/`` differ, as they may not in Megatron-LM either, or are of another number
            than ``--mtp-num-layers``; or see :func:`parse_pattern`.
    """
    _, *parts = layer_pattern(cfg).split(AHEAD)
    flag, count = f"--hybrid-layer-pattern {layer_pattern(cfg)!r}", cfg.mtp_num_layers
    if not parts:
        last = replace(blocks_of(cfg)[-1], first=True, capacity=None)
        return ((last,),) * (count or 0)
    if not all(part == parts[0] and part and CUT not in part for part in parts):
        raise UserError(
            f"{flag}: what stands behind each / are the layers of one further prediction, the same for all of them and "
            "without |, such as M-*-/*-/*-"
        )
    if count not in (None, len(parts)):
        raise UserError(
            f"--mtp-num-layers {count}: the pattern has layers for {len(parts)} further predictions "
            f"({layer_pattern(cfg)!r}); write as many / or leave the flag out"
        )
    return (parse_pattern(parts[0]),) * len(parts)


def expert_layers(cfg: ModelConfig) -> tuple[tuple[int, LayerKind], ...]:
    """(The block, the kind) of each layer that has experts, in order; those of further predictions are behind the
    model's.

    Raises:
        UserError: see :func:`kinds_of`.
    """
    blocks = (*blocks_of(cfg), *(block for blocks in ahead_of(cfg) for block in blocks))
    return tuple((index, kind) for index, block in enumerate(blocks) for kind in block.layers if kind.has_experts)
