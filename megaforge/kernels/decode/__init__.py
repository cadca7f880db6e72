"""One more token of each of a few sequences through a block of the model, in one call.

A token is little work for many operators: between them a processor waits for Python longer than for memory. Here a
block (norm, mixer, norm, FFN) is one operator, in which all threads work together. Activations are fp32; weights are
fp32, or bf16, whose products take inputs rounded to bf16, or packed codes (:mod:`megaforge.kernels.bitgemm`).
:mod:`.reference` is the definition, and describes the layers. A block with experts takes two calls, between which the
router's scores are made a choice. Only CPUs have compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megaforge.kernels.decode import native
from megaforge.kernels.decode.reference import FFN, GATED, Attention, Codes, Experts, Norm, Product, Router, TimeMix

__all__ = [
    "ACTIVATIONS", "FFN", "GATED", "MOST_TOKENS", "TYPES", "Angles", "Attention", "Block", "Cache", "Experts", "Norm",
    "Product", "Recurrent", "Router", "Shift", "TimeMix", "is_compiled", "step_block", "step_experts", "step_head",
    "takes_codes",
]  # fmt: skip

MOST_TOKENS = 8
ACTIVATIONS = ("relu2", "gated_relu2", "swiglu", "gelu", "gelu_exact")
TYPES = (torch.float32, torch.bfloat16)


class Shift(Protocol):
    """What a token shift remembers: its last normed input [M, h], of the matrices' type."""

    shift: Tensor | None


class Recurrent(Shift, Protocol):
    """Of a time mix also its matrices, fp32 [M, H, N, N]."""

    wkv: Tensor | None


class Cache(Protocol):
    """Keys and values [M, groups, capacity, width], ``length`` in use."""

    keys: Tensor | None
    values: Tensor | None
    length: int


@dataclass(frozen=True)
class Angles:
    """cos and sin of what each sequence's token turns by, fp32 of [M, pairs] elements."""

    cosine: Tensor
    sine: Tensor


def is_compiled(device_type: str) -> bool:
    """Whether there is compiled code for devices of this type."""
    return device_type != "meta" and device_type in native.COMPILED


def takes_codes(matrix: Codes, *, gated: bool = False) -> bool:
    """Whether the operator multiplies by this packed matrix; ``gated``: half of its rows are gates."""
    rows, columns = matrix.shape
    groups = matrix.scale.shape[1] if matrix.scale.dim() == 2 else 1
    together = 64 if matrix.panels.dtype == torch.int16 else 32  # rows that are read together
    return columns // groups % 32 == 0 and not (gated and rows // 2 % together)


def _product(product: Product) -> tuple[Tensor, Tensor | None]:
    """Of packed codes their scales, one a row at least, stand where a bias does."""
    if isinstance(product, tuple):
        return product
    scale = product.scale
    return product.panels, scale.expand(product.shape[0]).contiguous() if scale.dim() == 0 else scale.contiguous()


def _tensors(products: Sequence[Product]) -> list[Tensor | None]:
    return [tensor for product in products for tensor in _product(product)]


def _norm(norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    return norm.weight, norm.bias


@dataclass
class Block:
    """A mixer and what follows it, with their tensors in the order in which the operator takes them."""

    mixer: TimeMix | Attention
    ffn: FFN | Router | None
    weights: list[Tensor | None] = field(init=False)
    epsilons: list[float] = field(init=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        mixer, ffn = self.mixer, self.ffn
        self.weights, self.epsilons = [*_norm(mixer.norm)], [mixer.norm.epsilon]
        if isinstance(mixer, TimeMix):
            products = [
                mixer.receptance,
                mixer.key,
                mixer.value,
                mixer.output,
                *(each for two in mixer.maps for each in two),
            ]
            self.weights += [*mixer.mixes, *_tensors(products)]
            self.weights += [*mixer.vectors, *_norm(mixer.head_norm)]
            self.epsilons.append(mixer.head_norm.epsilon)
        else:
            self.weights += _tensors([mixer.qkv, mixer.output])
            for norm in (mixer.query_norm, mixer.key_norm, mixer.sub_norm):
                self.weights += _norm(norm)
                self.epsilons.append(norm.epsilon)
        self.name = ""
        if ffn is not None:
            self.weights += [*_norm(ffn.norm), ffn.mix]
            self.epsilons.append(ffn.norm.epsilon)
            self.name = ffn.activation if isinstance(ffn, FFN) else "router"
        if isinstance(ffn, FFN):
            self.weights += [*_tensors([ffn.up, ffn.down]), *_norm(ffn.sub_norm)]
            self.epsilons.append(ffn.sub_norm.epsilon)
        elif ffn is not None:
            self.weights += _tensors([ffn.scores])


def step_block(
    x: Tensor,
    block: Block,
    state: Recurrent | Cache,
    ffn_state: Shift | None,
    v_first: Tensor,
    *,
    angles: Angles | None = None,
    unused: Tensor | None = None,
    routed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Adds to the residual stream what a block makes of one token of each sequence; its states take the tokens in.

    Args:
        x: fp32 [M, h], M from 1 to :data:`MOST_TOKENS`; changed in place, as are the states.
        state: of the mixer; a cache has room for one more.
        ffn_state: of an FFN that mixes tokens.
        v_first: fp32 [M, C], made by the time mix that has no value map and read by the others.
        angles: of attention that rotates.
        unused: int64 [M], places at the beginning of each cache that hold no token; None: none.
        routed: of a :class:`Router`, where its input [M, h] (of the matrices' type) and scores (fp32 [M, E]) go.
    """
    mixer = block.mixer
    states: list[Tensor | None]
    inputs: list[Tensor | None] = []
    if isinstance(mixer, TimeMix):
        sizes = [mixer.heads, mixer.head_size, len(mixer.maps) == 3]
        states, kind = [v_first, state.shift, state.wkv], "rwkv7"  # type: ignore[union-attr]
    else:
        assert not hasattr(state, "wkv")
        sizes = [mixer.heads, mixer.groups, mixer.width, mixer.interleaved, state.length]
        states, kind = [state.keys, state.values], "attention"
        inputs = [None, None, unused] if angles is None else [angles.cosine, angles.sine, unused]
        state.length += 1
    if ffn_state is not None:
        states.append(ffn_state.shift)
    if routed is not None:
        states += routed
    native.BLOCK(x, kind, block.name, block.weights, states, inputs, sizes, block.epsilons)


def step_experts(x: Tensor, layer: Experts, inside: Tensor, chosen: Tensor, weights: Tensor) -> None:
    """Adds to the residual stream what the experts make of the tokens.

    Args:
        x: fp32 [M, h]; changed in place.
        inside: [M, h], from :func:`step_block`.
        chosen, weights: int32 and fp32 [M, k], the experts of each token, all different.
    """
    shared: list[Tensor | None] = []
    epsilon = layer.epsilon
    if layer.shared is not None:
        up, down, norm = layer.shared
        shared = [*_tensors([up, down]), norm.weight]
    native.EXPERTS(x, inside, chosen, weights, layer.activation, layer.up, layer.down, layer.sub_norm, shared, epsilon)


def step_head(x: Tensor, norm: Norm, weight: Tensor) -> Tensor:
    """Scores [M, n] in the type of ``weight`` [n, h] of a residual stream, fp32 [M, h]."""
    scores: Tensor = native.HEAD(x, norm.weight, norm.bias, norm.epsilon, weight)
    return scores
