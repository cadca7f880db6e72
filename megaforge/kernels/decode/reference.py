"""The definition of a step: one token of each of M sequences through a block, in the precision of its residual stream.

The layers' tensors are as their modules have them; ``state`` is what a layer remembers: an object with ``shift`` [M, h]
and, of a time mix, ``wkv`` [M, H, N (value), N (key)].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "gated_relu2")  # of the activations


class Codes(Protocol):
    """A packed matrix, as :class:`megaforge.kernels.bitgemm.Prepared` holds it."""

    @property
    def panels(self) -> Tensor: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def scale(self) -> Tensor: ...


Product = tuple[Tensor, Tensor | None] | Codes  # matrix [n, k] and bias [n], or packed codes


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm, or with a bias layer norm; ``weight`` None: there is none."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    epsilon: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        weight = self.weight.to(x.dtype)
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], weight, self.bias.to(x.dtype), self.epsilon)
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * weight


@dataclass(frozen=True)
class TimeMix:
    """RWKV-7's time mix.

    Attributes:
        mixes: x_r, x_w, x_k, x_v, x_a, x_g, each [h].
        receptance, key, value, output: projections.
        maps: first and second product of the low-rank maps of decay, rate, gate and value; in the model's first block
            the last is missing.
        vectors: w0, a0, k_k, k_a, r_k and, where there is a value map, v0; each of C = H N elements.
        head_norm: over each head, its vectors over all of them.
    """

    norm: Norm
    mixes: tuple[Tensor, ...]
    receptance: Product
    key: Product
    value: Product
    output: Product
    maps: tuple[tuple[Product, Product], ...]
    vectors: tuple[Tensor, ...]
    head_norm: Norm
    heads: int
    head_size: int


@dataclass(frozen=True)
class Attention:
    """Attention to a cache; ``interleaved``: channels 2i and 2i + 1 rotate together, and come out apart."""

    norm: Norm
    qkv: Product
    output: Product
    query_norm: Norm
    key_norm: Norm
    sub_norm: Norm
    heads: int
    groups: int
    width: int
    interleaved: bool = False


@dataclass(frozen=True)
class FFN:
    """A dense FFN; with ``mix`` [h], behind the mix with the token before."""

    norm: Norm
    mix: Tensor | None
    up: Product
    down: Product
    sub_norm: Norm
    activation: str


@dataclass(frozen=True)
class Router:
    """What decides the experts: scores of each, of the same input that the experts get."""

    norm: Norm
    mix: Tensor | None
    scores: Product


@dataclass(frozen=True)
class Experts:
    """Experts ``up`` [E, f or 2f, h] and ``down`` [E, h, f] with norms [E, f] between; and one that sees all tokens."""

    up: Tensor
    down: Tensor
    sub_norm: Tensor | None
    epsilon: float
    activation: str
    shared: tuple[Product, Product, Norm] | None


def linear(x: Tensor, product: Product) -> Tensor:
    assert isinstance(product, tuple), "what packed codes give is defined where they are packed"
    weight, bias = product
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def activate(kind: str, x: Tensor) -> Tensor:
    if kind == "relu2":
        return x.relu().square()
    if kind in GATED:
        gate, up = x.chunk(2, -1)
        return (F.silu(gate) if kind == "swiglu" else gate.relu().square()) * up
    return F.gelu(x, approximate="tanh" if kind == "gelu" else "none")


def time_mix(layer: TimeMix, x: Tensor, state: Any, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the layer adds to the residual stream [M, h], and v_first [M, C]. ``state`` takes the tokens in."""
    normed = layer.norm(x)
    before = state.shift.to(x.dtype)
    x_r, x_w, x_k, x_v, x_a, x_g = (normed + (before - normed) * mix.to(x.dtype) for mix in layer.mixes)
    w0, a0, k_k, k_a, r_k = (vector.to(x.dtype).flatten() for vector in layer.vectors[:5])
    r, key, v = linear(x_r, layer.receptance), linear(x_k, layer.key), linear(x_v, layer.value)
    decay_map, rate_map, gate_map = layer.maps[:3]
    decay = linear(linear(x_w, decay_map[0]).tanh(), decay_map[1])
    rate = torch.sigmoid(a0 + linear(linear(x_a, rate_map[0]), rate_map[1]))
    gate = linear(linear(x_g, gate_map[0]).sigmoid(), gate_map[1])
    if len(layer.maps) > 3:
        assert v_first is not None
        share = linear(linear(x_v, layer.maps[3][0]), layer.maps[3][1])
        v = v + (v_first - v) * torch.sigmoid(layer.vectors[5].to(x.dtype) + share)
    else:
        v_first = v
    heads = (len(x), layer.heads, layer.head_size)
    w = (-math.exp(-0.5) * torch.sigmoid(w0 + decay)).exp().view(heads)
    removed = F.normalize((key * k_k).view(heads), dim=-1, eps=1e-12)
    k = (key * (1 + (rate - 1) * k_a)).view(heads)
    rows, columns = (lambda t: t.view(heads).unsqueeze(-1)), (lambda t: t.view(heads).unsqueeze(-2))
    wkv = state.wkv.to(x.dtype)
    back = columns(removed * rate.view(heads))
    wkv = wkv * columns(w) + (wkv @ rows(-removed)) * back + rows(v) * columns(k)
    y = F.layer_norm((wkv @ rows(r)).squeeze(-1), heads[-1:], eps=layer.head_norm.epsilon).flatten(1)
    assert layer.head_norm.weight is not None and layer.head_norm.bias is not None
    y = y * layer.head_norm.weight.to(x.dtype) + layer.head_norm.bias.to(x.dtype)
    bonus = (r.view(heads) * k * r_k.view(heads[1:])).sum(-1, keepdim=True) * v.view(heads)
    state.shift, state.wkv = normed, wkv
    return linear((y + bonus.flatten(1)) * gate, layer.output), v_first


def attention(
    layer: Attention, x: Tensor, keys: Tensor, values: Tensor, angles: Tensor | None, unused: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer adds to the residual stream [M, h], and the cache with the tokens.

    Args:
        keys, values: [M, groups, t, width], of the tokens before.
        angles: [M, pairs], which each sequence's token turns by; None: none.
        unused: int64 [M], how many places at the beginning hold no token; None: none.
    """
    shape = (len(x), layer.heads, layer.groups, layer.groups)
    fused = linear(layer.norm(x), layer.qkv).view(len(x), sum(shape[1:]), layer.width)
    query, key, value = fused.split(shape[1:], dim=1)
    query, key = (_rotated(t, angles, layer.interleaved) for t in (layer.query_norm(query), layer.key_norm(key)))
    keys, values = (
        torch.cat([keys.to(x.dtype), key[:, :, None]], 2),
        torch.cat([values.to(x.dtype), value[:, :, None]], 2),
    )
    each = layer.heads // layer.groups
    scores = query[:, :, None] @ keys.repeat_interleave(each, 1).transpose(-1, -2) / math.sqrt(layer.width)
    if unused is not None:
        hidden = torch.arange(keys.shape[2]) < unused[:, None]
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    context = (scores.softmax(-1) @ values.repeat_interleave(each, 1)).flatten(1)
    return linear(layer.sub_norm(context), layer.output), keys, values


def _rotated(x: Tensor, angles: Tensor | None, interleaved: bool) -> Tensor:
    if angles is None:
        return x
    pairs = angles.shape[-1]
    cosine, sine = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    if interleaved:
        first, second = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    else:
        first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, x[..., 2 * pairs :]], -1)


def entered(layer: FFN | Router, x: Tensor, state: Any) -> Tensor:
    """An FFN's input [M, h]. ``state`` takes the tokens in."""
    normed = layer.norm(x)
    if layer.mix is None:
        return normed
    mixed = normed + (state.shift.to(x.dtype) - normed) * layer.mix.to(x.dtype)
    state.shift = normed
    return mixed


def ffn(layer: FFN, x: Tensor, state: Any = None) -> Tensor:
    """What the layer adds to the residual stream [M, h]."""
    inner = activate(layer.activation, linear(entered(layer, x, state), layer.up))
    return linear(layer.sub_norm(inner), layer.down)


def experts(layer: Experts, inside: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the layer adds to the residual stream; of each token its ``chosen`` experts [M, k] and their weights."""
    out = torch.zeros_like(inside)
    for token, (own, shares) in enumerate(zip(chosen.tolist(), weights.to(inside.dtype), strict=True)):
        for expert, share in zip(own, shares, strict=True):
            norm = Norm() if layer.sub_norm is None else Norm(layer.sub_norm[expert], None, layer.epsilon)
            inner = norm(activate(layer.activation, linear(inside[token], (layer.up[expert], None))))
            out[token] += share * linear(inner, (layer.down[expert], None))
    if layer.shared is not None:
        up, down, norm = layer.shared
        out += linear(norm(activate(layer.activation, linear(inside, up))), down)
    return out
