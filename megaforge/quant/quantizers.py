"""Quantizers as pure functions: what the codes of a matrix or of activations are, and what a code stands for.

Weights, of the b1 and b1.58 of "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024) and of plain
integers. With ``s`` the step, what a code of 1 stands for:

- ``binary``: ``w >= mean(w)`` is +1, else -1; s = mean|w|.
- ``ternary``: ``round(w / s)`` within -1..1; s = mean|w|, at least 1e-5.
- ``int4``, ``int8``: ``round(w / s)``; s = max|w| / 7 or / 127. Asymmetric: 16 or 256 levels between the least and the
  largest weight, zero among them.

A step holds for a whole logical matrix, for each of its rows (channel), or for each group of neighbours in a row.

Activations have a step for each token: ``x * (127 / max|x|)``, rounded half to even, within -128..127; with 4 bits 7
and -8..7; asymmetric as above. Everything is computed in fp32, in fp64 for fp64 tensors. A NaN or an infinity among the
weights of a step, or in a token, makes the step NaN, and with it every product.

Codes are whole numbers, so that what is made of them lies on a lattice: a document's first token is alone in attention,
whose output is then v, whole multiples of one step, and half of the largest of these lies between two codes. Which one
it becomes is left to the last bit of a sum, and with it to the layout. In fp64, where layouts are compared, codes
of activations therefore change :data:`OFF_LATTICE` beside the half; in fp32 they change at the half, as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 16  # weights
OFF_LATTICE = 1 + 2.0**-30
SMALLEST = 1e-5  # of a ternary step and of the largest magnitude of a token, as published
_LARGEST_CODE = {"binary": 1, "ternary": 1, "int4": 7, "int8": 127}
SCHEMES = tuple(_LARGEST_CODE)


@dataclass(frozen=True)
class WeightScheme:
    """How weights become codes.

    Attributes:
        kind: one of :data:`SCHEMES`.
        granularity: what shares a step: ``tensor``, ``channel`` (a row) or ``group``.
        group_size: neighbours of a row that share one, with ``group``.
        asymmetric: of int4 and int8: the levels lie between the least and the largest weight.
        scale_dtype: the type that steps are rounded to, as a file will store them.
    """

    kind: str
    granularity: str = "tensor"
    group_size: int = 128
    asymmetric: bool = False
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.kind not in _LARGEST_CODE:
            raise ValueError(f"{self.kind!r} is not a quantizer of weights; there are {', '.join(SCHEMES)}")
        if self.asymmetric and self.by_mean:
            raise ValueError(f"{self.kind} weights are symmetric")

    @property
    def by_mean(self) -> bool:
        """Whether steps are means of magnitudes, not largest ones."""
        return self.kind in ("binary", "ternary")

    @property
    def largest_code(self) -> int:
        return _LARGEST_CODE[self.kind]

    @property
    def bits(self) -> int:
        """Bits that a packed code takes."""
        return {"binary": 1, "ternary": 2, "int4": 4, "int8": 8}[self.kind]

    def view(self, w: Tensor) -> Tensor:
        """The weights [..., N, K], or as [..., N, K / group, group]: what :class:`Scale` broadcasts to."""
        return w.unflatten(-1, (-1, self.group_size)) if self.granularity == "group" else w

    @property
    def shared_dims(self) -> tuple[int, ...]:
        """Dimensions of :meth:`view` that share a step."""
        return (-2, -1) if self.granularity == "tensor" else (-1,)


class Statistics(NamedTuple):
    """What a step is made of, by the kind of scheme: sums of magnitudes and, of binary ones, of weights (which add up
    over parts of a matrix), or the largest weight and the largest of their negatives. In fp64; like :class:`Scale`.

    Attributes:
        number: of weights that share a step.
    """

    first: Tensor
    second: Tensor
    number: int


class Scale(NamedTuple):
    """What codes stand for: ``(code - zero) * step``.

    Attributes:
        step: [..., 1, 1], [..., N, 1] or [..., N, K / group, 1], fp32 or fp64; never negative.
        shift: like ``step``: of binary weights the mean that signs are taken beside; of asymmetric ones the code of
            zero; None otherwise.
    """

    step: Tensor
    shift: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Scale:
        """What ``change`` makes of each tensor."""
        return Scale(change(self.step), None if self.shift is None else change(self.shift))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that quantizers compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_statistics(w: Tensor, scheme: WeightScheme) -> Statistics:
    """Of the weights [..., N, K]."""
    view, dims = scheme.view(w), scheme.shared_dims
    count = view.shape[-1] * (view.shape[-2] if len(dims) == 2 else 1)
    if scheme.by_mean:
        return Statistics(*_sums(view, dims, of_weights=scheme.kind == "binary"), count)
    # A maximum over ranks may pass a NaN over, and never an infinity.
    first, second = (part.amax(dims, keepdim=True).double().nan_to_num(math.inf, math.inf) for part in (view, -view))
    return Statistics(first, second, count)


def clipped(statistics: Statistics, scheme: WeightScheme, share: Tensor | None) -> Statistics:
    """Of levels that reach ``share`` (0-d; None: all) of the weights' range. The mean that binary weights' signs are
    taken beside stays."""
    if share is None:
        return statistics
    first, second, number = statistics
    return Statistics(first * share, second if scheme.by_mean else second * share, number)


def _sums(view: Tensor, dims: tuple[int, ...], *, of_weights: bool) -> tuple[Tensor, Tensor]:
    """Of magnitudes and, where they are needed, of weights; on a CPU by as many rows as its nearest caches hold."""
    rows = view.shape[-2]
    size = max(1, _AT_ONCE * rows // max(1, view.numel())) if view.device.type == "cpu" else max(1, rows)

    def sums(part: Tensor) -> tuple[Tensor, Tensor]:
        first = part.abs().sum(dims, keepdim=True, dtype=torch.float64)
        return first, part.sum(dims, keepdim=True, dtype=torch.float64) if of_weights else torch.zeros_like(first)

    found = [sums(part) for part in view.split(size, -2)]
    if len(found) == 1:
        return found[0]
    if -2 in dims:
        return torch.stack([one for one, _ in found]).sum(0), torch.stack([other for _, other in found]).sum(0)
    return torch.cat([one for one, _ in found], -2), torch.cat([other for _, other in found], -2)


def weight_scale(statistics: Statistics, scheme: WeightScheme, dtype: torch.dtype) -> Scale:
    """The steps, for weights of ``dtype``."""
    first, second, count = statistics
    kept = scheme.scale_dtype if scheme.scale_dtype != torch.float32 else wide(dtype)

    def rounded(step: Tensor) -> Tensor:
        return torch.where(step.isfinite(), step, torch.nan).to(wide(dtype)).to(kept).to(wide(dtype))

    if scheme.by_mean:
        mean = first / count
        if scheme.kind == "ternary":
            return Scale(rounded(mean.clamp_min(SMALLEST)))
        return Scale(rounded(mean), (second / count).to(wide(dtype)))
    if not scheme.asymmetric:
        return Scale(rounded(torch.maximum(first, second) / scheme.largest_code))
    low, levels = second.clamp_min(0), 2 * scheme.largest_code + 1
    step = rounded((first.clamp_min(0) + low) / levels)
    return Scale(step, (low.to(step.dtype) * _inverse(step)).round() - (scheme.largest_code + 1))


def _inverse(step: Tensor) -> Tensor:
    """1 / step; 0 where the step is 0."""
    return torch.where(step == 0, 0, step.reciprocal())


def weight_codes(w: Tensor, scale: Scale, scheme: WeightScheme, noise: Tensor | None = None) -> Tensor:
    """int8 codes of the weights [..., N, K], in their shape.

    Args:
        noise: added to the weights before they are rounded, in steps; like the scheme's view of the weights.
    """
    view, (step, shift) = scheme.view(w).to(scale.step.dtype), scale
    if scheme.kind == "binary":
        assert shift is not None
        view = view if noise is None else view + noise * step
        return (view >= shift).view(w.shape).to(torch.int8).mul_(2).sub_(1)
    code = view * _inverse(step)
    code = code if noise is None else code.add_(noise)
    largest, least = scheme.largest_code, -1 if scheme.kind == "ternary" else -scheme.largest_code - 1
    code = code.round_() if shift is None else code.round_().add_(shift)
    return code.clamp_(least, largest).to(torch.int8).view(w.shape)


def weight_values(codes: Tensor, scale: Scale, scheme: WeightScheme) -> Tensor:
    """What the codes [..., N, K] stand for, in the type of the step."""
    levels = scheme.view(codes).to(scale.step.dtype)
    if scheme.asymmetric:
        assert scale.shift is not None
        levels = levels - scale.shift
    return (levels * scale.step).view(codes.shape)


def quantize_weight(
    w: Tensor, scheme: str, scale: Tensor | None = None, granularity: str = "tensor", group_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Codes and steps of logical matrices with symmetric levels.

    Args:
        w: [..., N, K].
        scheme: one of :data:`SCHEMES`.
        scale: the steps, as returned; None: those of ``w``.
        granularity: ``tensor``, ``channel`` or ``group``.
        group_size: neighbours of a row that share a step; divides K.

    Returns:
        int8 codes like ``w``, and steps of the leading dimensions (tensor), [..., N] (channel) or [..., N, K / group].
    """
    how = WeightScheme(scheme, granularity, group_size)
    found = weight_scale(weight_statistics(w, how), how, w.dtype)
    dropped = (-2, -1) if granularity == "tensor" else (-1,)
    if scale is not None:
        step = scale
        for _ in dropped:
            step = step.unsqueeze(-1)
        found = Scale(step.to(wide(w.dtype)), found.shift)
    return weight_codes(w, found, how), found.step.squeeze(dropped)


@dataclass(frozen=True)
class ActivationScheme:
    """How activations become codes of ``bits`` (4 or 8), a step for each token.

    Attributes:
        asymmetric: the levels lie between the least and the largest value of a token, zero among them.
    """

    bits: int = 8
    asymmetric: bool = False

    @property
    def largest_code(self) -> int:
        return int(2 ** (self.bits - 1)) - 1


def activation_range(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """What the steps of the tokens [..., K] are made of, [..., 1]: the largest magnitude, or [..., 2] the largest value
    and the largest negative; where a token is split, the largest of what its parts have."""
    if scheme.asymmetric:
        low, high = torch.aminmax(x, dim=-1)
        extent = torch.stack((high, -low), -1).clamp_min(0).to(wide(x.dtype))
    else:
        extent = x.abs().amax(-1, keepdim=True).to(wide(x.dtype))
    return torch.where(extent.isfinite(), extent, math.inf)  # see weight_statistics


def activation_codes(x: Tensor, extent: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """The codes of tokens whose ranges are known.

    Args:
        x: [..., K].
        extent: of :func:`activation_range`.

    Returns:
        int8 codes like ``x``; and [..., 1] the step, or [..., 2] the step and the code of zero, fp32 (fp64 for fp64).
    """
    extent = torch.where(extent.isfinite(), extent, torch.nan)
    largest = scheme.largest_code
    levels = 2 * largest + 1 if scheme.asymmetric else largest
    width = extent.sum(-1, keepdim=True).clamp_min(SMALLEST)
    inverse = width.reciprocal() * levels  # as torch divides a number by a tensor; other roundings are other codes
    if inverse.dtype == torch.float64:
        inverse = inverse / OFF_LATTICE
    code = (x.to(extent.dtype) * inverse).round_()
    step = width / levels
    if scheme.asymmetric:
        zero = (extent[..., 1:] * inverse).round_() - (largest + 1)
        code += zero
        step = torch.cat((step, zero), -1)
    return code.clamp_(-largest - 1, largest).to(torch.int8), step


def activation_levels(codes: Tensor, step: Tensor) -> Tensor:
    """Codes as whole numbers, 0 for zero, in the type of the step."""
    levels = codes.to(step.dtype)
    return levels - step[..., 1:] if step.shape[-1] == 2 else levels


def activation_values(codes: Tensor, step: Tensor) -> Tensor:
    """What codes stand for, in the type of the step."""
    return activation_levels(codes, step).mul_(step[..., :1])
