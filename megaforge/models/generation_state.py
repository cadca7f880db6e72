"""What a model remembers while it writes: states of sequences side by side, whatever their lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaforge.nn.attention import KVCache
from megaforge.nn.mlp import FFNState
from megaforge.nn.rwkv7 import RWKV7State


@dataclass
class BlockState:
    """What one block remembers of the tokens seen so far."""

    mixer: RWKV7State | KVCache | None
    ffn: FFNState | None


@dataclass
class GenerationState:
    """What a model remembers between calls of :meth:`HybridModel.logits`: RWKV states and key/value caches.

    Attributes:
        length: places in the caches, of the longest sequence.
        padding_B: int64 [b], how many of them are empty, at the beginning of each sequence; None: no sequence has any.
    """

    blocks: list[BlockState] = field(default_factory=list)
    length: int = 0
    padding_B: Tensor | None = None


def side_by_side(states: Sequence[GenerationState]) -> GenerationState:
    """The sequences of all ``states`` as one batch. Caches end together; recurrent states need no alignment."""
    length = max(state.length for state in states)
    blocks = []
    for parts in zip(*(state.blocks for state in states), strict=True):
        mixers = [part.mixer for part in parts]
        shifts = [part.ffn.shift for part in parts if part.ffn is not None]
        ffn = FFNState(_cat(shifts)) if shifts else None
        blocks.append(BlockState(_join(mixers, length), ffn))
    padding = [_padding(state) + length - state.length for state in states]
    return GenerationState(blocks, length, torch.cat(padding))


def chosen(state: GenerationState, rows: Tensor) -> GenerationState:
    """The sequences ``rows`` of a batch, int64 [n] on its device, in this order; one may be named more than once."""

    def take(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, rows)

    blocks = [
        BlockState(_mapped(b.mixer, take), None if b.ffn is None else FFNState(take(b.ffn.shift))) for b in state.blocks
    ]
    return GenerationState(blocks, state.length, take(state.padding_B))


def _mapped(
    mixer: RWKV7State | KVCache | None, change: Callable[[Tensor | None], Tensor | None]
) -> RWKV7State | KVCache | None:
    if isinstance(mixer, RWKV7State):
        return RWKV7State(change(mixer.shift), change(mixer.wkv))
    if isinstance(mixer, KVCache):
        return KVCache(change(mixer.keys), change(mixer.values), mixer.length)
    return None


def _join(mixers: Sequence[RWKV7State | KVCache | None], length: int) -> RWKV7State | KVCache | None:
    if isinstance(mixers[0], RWKV7State):
        recurrent = [mixer for mixer in mixers if isinstance(mixer, RWKV7State)]
        return RWKV7State(_cat([m.shift for m in recurrent]), _cat([m.wkv for m in recurrent]))
    caches = [mixer for mixer in mixers if isinstance(mixer, KVCache)]
    if not caches:
        return None
    return KVCache(
        _aligned([(c.keys, c.length) for c in caches], length),
        _aligned([(c.values, c.length) for c in caches], length),
        length,
    )


def _aligned(caches: Sequence[tuple[Tensor | None, int]], length: int) -> Tensor:
    """Caches [b, groups, capacity, d] one after the other along b, their last used place at ``length``."""
    filled = [(cache, used) for cache, used in caches if cache is not None]
    first = filled[0][0]
    rows = sum(cache.shape[0] for cache, _ in filled)
    # Zeros: a place that a mask hides must still be a number.
    out = first.new_zeros((rows, first.shape[1], 2 * length, first.shape[3]))
    start = 0
    for cache, used in filled:
        out[start : start + cache.shape[0], :, length - used : length] = cache[:, :, :used]
        start += cache.shape[0]
    return out


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    known = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(known) if known else None


def _padding(state: GenerationState) -> Tensor:
    if state.padding_B is not None:
        return state.padding_B
    for block in state.blocks:
        held = block.mixer.shift if isinstance(block.mixer, RWKV7State) else getattr(block.mixer, "keys", None)
        if held is not None:
            return torch.zeros(held.shape[0], dtype=torch.long, device=held.device)
    raise ValueError("an empty state holds no sequences")
