"""Codes and steps of whole matrices, as files hold them, and a rank's part of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megaforge.kernels.bitgemm.reference import pack_codes, unpack_codes
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec
from megaforge.quant.quantizers import Scale, WeightScheme, clipped, weight_codes, weight_scale, weight_statistics


class CodedMatrix(NamedTuple):
    """A matrix, several fused in one, or a stack of experts'.

    Attributes:
        codes: int8 [(E,) N, K].
        step: what a code of 1 stands for: [(E,) parts] where steps belong to the logical matrices (q, k and v; gate and
            up; one), [(E,) N] to rows, [(E,) N, K / group] to groups.
        zero: of asymmetric levels the code of zero, like ``step``.
    """

    codes: Tensor
    step: Tensor
    zero: Tensor | None = None


@torch.no_grad()
def code_matrix(
    weight: Tensor, parts: tuple[int, ...], scheme: WeightScheme, share: Tensor | None = None
) -> CodedMatrix:
    """The codes that training saw of ``weight`` [(E,) N, K], in the type that the model computes in.

    Args:
        parts: rows of the logical matrices fused in it; empty: one.
        scheme: how they become codes.
        share: of their range that levels reach, 0-d; None: all.
    """
    found = []
    for part in weight.split(parts or weight.shape[-2], dim=-2):
        scale = weight_scale(clipped(weight_statistics(part, scheme), scheme, share), scheme, weight.dtype)
        found.append((weight_codes(part, scale, scheme), scale.step, scale.shift if scheme.asymmetric else None))
    codes, steps, shifts = (list(column) for column in zip(*found, strict=True))
    dropped = (-1, -2) if scheme.granularity == "tensor" else (-1,)
    join = torch.stack if scheme.granularity == "tensor" else torch.cat
    along = -1 if scheme.granularity in ("tensor", "channel") else -2

    def joined(tensors: list[Tensor]) -> Tensor:
        return join([one.squeeze(dropped) for one in tensors], dim=along)

    return CodedMatrix(torch.cat(codes, dim=-2), joined(steps), joined(shifts) if scheme.asymmetric else None)


def scale_of(matrix: CodedMatrix, parts: tuple[int, ...], scheme: WeightScheme) -> Scale:
    """The steps of ``matrix`` as :class:`megaforge.quant.linear.QuantizedLinear` has them: one for all rows, one for
    each row or one for each group."""

    def spread(values: Tensor) -> Tensor:
        if scheme.granularity == "tensor":
            rows = torch.tensor(parts or (1,), device=values.device)
            values = values.repeat_interleave(rows, dim=-1)
        return values.unsqueeze(-1)

    return Scale(spread(matrix.step), None if matrix.zero is None else spread(matrix.zero))


def local_codes(
    matrix: CodedMatrix, spec: ParamSpec, scheme: WeightScheme, ctx: ParallelContext
) -> tuple[Tensor, Scale]:
    """This rank's part: codes, and their steps."""
    scale = scale_of(matrix, spec.parts, scheme)
    step, shift = (None if one is None else _local(one, spec, ctx) for one in scale)
    assert step is not None
    return spec.take_local(matrix.codes, ctx), Scale(step, shift)


def _local(values: Tensor, spec: ParamSpec, ctx: ParallelContext) -> Tensor:
    """What a rank has of values that broadcast to the parameter, or of one for each group of its rows."""
    cut = []
    for piece in spec.pieces(ctx):
        box = [
            slice(a * values.shape[dim] // size, b * values.shape[dim] // size)
            if values.shape[dim] > 1
            else slice(None)
            for dim, ((a, b), size) in enumerate(zip(piece.global_box, spec.shape, strict=True))
        ]
        cut.append(values[tuple(box)])
    return cut[0] if len(cut) == 1 else torch.cat(cut, dim=spec.shard_dim or 0)


def pack_stack(codes: Tensor, kind: str) -> Tensor:
    """int8 [(E,) N, K] -> uint8 [(E,) N, bytes]: :func:`megaforge.kernels.bitgemm.pack`'s rows, or int8 as it is."""
    if kind == "int8":
        return codes.view(torch.uint8)
    return pack_codes(codes.flatten(0, -2), kind).view(*codes.shape[:-1], -1)


def unpack_stack(packed: Tensor, kind: str, columns: int) -> Tensor:
    """The inverse."""
    if kind == "int8":
        return packed.view(torch.int8)
    return unpack_codes(packed.flatten(0, -2), kind, columns).view(*packed.shape[:-1], columns)
