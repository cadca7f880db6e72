"""``--peft qlora``: LoRA beside matrices that are kept in 4 bits (Dettmers et al., arXiv 2305.14314).

All matrices that update rules of matrices take are kept so, whether they have an adapter or not: not the embedding, the
head, routers and low-rank maps. Scales of the second order are of a whole logical matrix (q, k and v are three), so
that every layout has the same codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.kernels.grouped_mm import Runs
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import Entry
from megaforge.parallel.layers import Linear, linears
from megaforge.parallel.linear_op import PlainLinear
from megaforge.parallel.param_spec import Box, ParamSpec, declare, spec_of
from megaforge.peft.adapter import AdaptedOp
from megaforge.peft.four_bits import NESTED_BLOCK, FourBits, dequantize, dequantize_scales, quantize
from megaforge.peft.lora import lora

_CHILD = "four_bits"
_PARTS = ("codes", "scales", "nested", "offset")


@dataclass(frozen=True)
class Coding:
    """How a parameter [(E,) out, in] is coded.

    Attributes:
        spec: of the parameter.
        kind: of levels.
        block: input features of one scale.
        double: whether scales are coded too.
    """

    spec: ParamSpec
    kind: str
    block: int
    double: bool

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(start, stop) of the rows of each logical matrix."""
        by_rows = self.spec.parts if self.spec.shard_dim == len(self.spec.shape) - 2 else ()
        sizes = by_rows or (self.spec.shape[-2],)
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        return list(zip([0, *ends], ends, strict=False))

    @property
    def per_row(self) -> int:
        """Scales of a row."""
        return self.spec.shape[-1] // self.block

    def nested_places(self, part: int) -> tuple[int, int]:
        """Where a logical matrix's scales of the second order lie among all of them."""
        counts = [-(-(stop - start) * self.per_row // NESTED_BLOCK) for start, stop in self.rows]
        return sum(counts[:part]), sum(counts[: part + 1])

    def code(self, weight: Tensor) -> FourBits:
        """Of the whole parameter, or some experts of it."""
        stack = weight if weight.dim() == 3 else weight.unsqueeze(0)
        coded = [
            [quantize(one[start:stop], self.kind, self.block, double=self.double) for start, stop in self.rows]
            for one in stack
        ]
        columns = [
            torch.stack([torch.cat([part[place] for part in expert]) for expert in coded])
            for place in range(len(_PARTS))
        ]
        return FourBits(*(column if weight.dim() == 3 else column[0] for column in columns))


@lru_cache(maxsize=1)  # a layer's parameters are filled one after the other
def _initial_codes(coding: Coding, seed: int, name: str, box: Box) -> FourBits:
    return coding.code(coding.spec.init.fill(seed, name, coding.spec.shape, box))


@dataclass(frozen=True)
class CodesOfInit:
    """Initial values: the codes of those that the parameter would have had."""

    coding: Coding
    part: int

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """As of :class:`megaforge.parallel.init_rules.InitRule`."""
        spec, of_weight = self.coding.spec, name.rpartition(f".{_CHILD}.")[0] + ".weight"
        experts = () if spec.expert_dim is None else (box[0],)
        whole: Box = (*experts, *((0, size) for size in spec.shape[-2:]))
        values = _initial_codes(self.coding, seed, of_weight, whole)[self.part]
        own = tuple(slice(a, b) for a, b in box[len(experts) :])
        return values[(slice(None),) * len(experts) + own].double()


class FourBitMatrix(nn.Module):
    """What a layer's matrix is kept as, of this rank: parameters that training leaves as they are."""

    def __init__(self, coding: Coding, ctx: ParallelContext, place: torch.device) -> None:
        super().__init__()
        self.coding, self.ctx = coding, ctx
        spec = coding.spec
        *stack, rows, width = spec.shape
        split = width if spec.shard_dim != len(spec.shape) - 1 else width // ctx.axis(spec.shard_axis).size
        if split % 2:
            raise UserError(f"--peft qlora: a rank has {split} input features of {spec.name}; use a --tp that leaves 2")
        # A row layer's scales are whole on every rank where blocks lie across ranks.
        self.aligned = split % coding.block == 0
        few = (coding.nested_places(len(coding.rows))[0], len(coding.rows)) if coding.double else ()
        unsplit = dataclasses.replace(spec, shard_dim=None, parts=())
        of_scales = spec if self.aligned else unsplit
        shapes = ((*stack, rows, width // 2), (*stack, rows, coding.per_row), *((*stack, count) for count in few))
        types = (torch.uint8, torch.uint8 if coding.double else torch.float32, torch.float32, torch.float32)
        declared = (spec, of_scales, unsplit, unsplit)
        self.names = _PARTS[: len(shapes)]
        for number, (name, shape, dtype, base) in enumerate(zip(_PARTS, shapes, types, declared, strict=False)):
            own = dataclasses.replace(
                base, name="", shape=shape, init=CodesOfInit(coding, number), role="state", update="elementwise",
                frozen=True, tp_partial_grad=False, codes_of=spec.numel if name == "codes" else 0,
            )  # fmt: skip
            empty = torch.empty(own.local_shape(ctx), dtype=dtype, device=place)
            parameter = nn.Parameter(empty, requires_grad=False)
            declare(parameter, own)
            self.register_parameter(name, parameter)

    def part(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self, name))

    @torch.no_grad()
    def values(self, dtype: torch.dtype) -> Tensor:
        """This rank's shard [(E,) out, in] of what products see."""
        return dequantize(self.part("codes"), self._scales(), self.coding.kind).to(dtype)

    def _scales(self) -> Tensor:
        """fp32, for each block of the shard's codes or, where blocks lie across ranks, for each code."""
        scales = self.part("scales")
        whole: Tensor = self._single(scales) if self.coding.double else scales
        if self.aligned:
            return whole
        spec = spec_of(self.part("codes"))
        ((start, stop),) = {piece.global_box[-1] for piece in spec.pieces(self.ctx)}
        return whole.repeat_interleave(self.coding.block, -1)[..., 2 * start : 2 * stop]

    def _single(self, scales: Tensor) -> Tensor:
        nested, made = self.part("nested"), torch.empty_like(scales, dtype=torch.float32)
        for piece in spec_of(self.part("scales")).pieces(self.ctx):
            for number, (start, stop) in enumerate(self.coding.rows):
                low, high = (min(max(at, start), stop) for at in piece.global_box[-2])
                if low >= high:
                    continue
                (first, last), shift = piece.global_box[-1], piece.local_box[-2][0] - piece.global_box[-2][0]
                rows = torch.arange(low - start, high - start, device=scales.device)
                places = rows[:, None] * self.coding.per_row + torch.arange(first, last, device=scales.device)
                own, at = slice(*self.coding.nested_places(number)), slice(low + shift, high + shift)
                offset = self.part("offset")[..., number, None, None]
                made[..., at, :] = dequantize_scales(scales[..., at, :], nested[..., own], offset, places)
        return made

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Codes ``weight``: the whole parameter, of this rank's experts."""
        coded = self.coding.code(weight)
        for name, values in zip(self.names, coded, strict=False):
            parameter = self.part(name)
            for piece in spec_of(parameter).pieces(self.ctx):
                box = piece.global_box if weight.dim() == 2 else (piece.local_box[0], *piece.global_box[1:])
                piece.local_view(parameter).copy_(values[tuple(slice(a, b) for a, b in box)])

    def extra_repr(self) -> str:
        return f"{self.coding.kind}, blocks of {self.coding.block}" + ", 8-bit scales" * self.coding.double


class FourBitLinear(PlainLinear):
    """The plain product with a matrix that is kept in 4 bits, made wide for each product."""

    keeps_weight = False

    def __init__(self, matrix: FourBitMatrix) -> None:
        self.held = matrix

    def forward(
        self, inside: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None = None, runs: Runs | None = None
    ) -> Tensor:
        return super().forward(inside, self.held.values(inside[0].dtype), bias, runs)

    def input_gradient(self, grad: Tensor, weight: Tensor, runs: Runs | None = None) -> Tensor:
        return super().input_gradient(grad, self.held.values(grad.dtype), runs)


def qlora(model: nn.Module, ctx: ParallelContext) -> None:
    """The converter.

    Raises:
        UserError: as of :func:`megaforge.peft.lora.lora`, or ``--qlora-block-size`` does not divide a matrix.
    """
    cfg = cast(ModelConfig, model.cfg)
    lora(model, ctx)
    for path, layer in linears(model):
        spec = spec_of(layer.weight)
        if spec.role != "matrix" or spec.update != "matrix" or layer.transposed:
            continue
        base = layer.op.base if isinstance(layer.op, AdaptedOp) else layer.op
        if type(base) is not PlainLinear:
            raise UserError(f"--peft qlora: {path} is quantized already (--quantize-weights); use --peft lora")
        if spec.shape[-1] % cfg.qlora_block_size:
            raise UserError(
                f"--qlora-block-size {cfg.qlora_block_size}: it does not divide the {spec.shape[-1]} input features "
                f"of {path}; use {spec.shape[-1] & -spec.shape[-1]}"
            )
        coding = Coding(
            dataclasses.replace(spec, name=f"{path}.weight"),
            cfg.qlora_quant_type,
            cfg.qlora_block_size,
            cfg.qlora_double_quant,
        )
        keep_in_four_bits(layer, FourBitMatrix(coding, ctx, layer.weight.device))


def keep_in_four_bits(layer: Linear, matrix: FourBitMatrix) -> None:
    """``layer`` has codes in place of its weight, of which its shape and declaration stay."""
    weight = layer.weight
    gone = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    declare(gone, spec_of(weight))
    del layer.weight
    layer.__dict__["weight"] = gone  # not a parameter of the model
    layer.add_module(_CHILD, matrix)
    op = FourBitLinear(matrix)
    if isinstance(layer.op, AdaptedOp):
        layer.op.base = op
    else:
        layer.op = op


def four_bit_matrices(model: nn.Module) -> Iterator[FourBitMatrix]:
    """Those of a model, in its order."""
    for module in model.modules():
        if isinstance(module, FourBitMatrix):
            yield module


def code_base(model: nn.Module, ctx: ParallelContext, saved: set[str], load: Callable[[list[Entry]], object]) -> None:
    """Fills the matrices that are kept in 4 bits from the weights of a checkpoint, one at a time. Collective.

    Args:
        saved: the names there; of a checkpoint that has codes nothing is to do.
        load: fills entries from it; collective.
    """
    wanted = [one for one in four_bit_matrices(model) if one.coding.spec.name in saved]
    for turn in range(max(exchange(ctx, len(wanted)))):
        if turn >= len(wanted):
            load([])  # the other ranks have more
            continue
        matrix = wanted[turn]
        spec = dataclasses.replace(matrix.coding.spec, shard_dim=None, parts=())
        whole = torch.empty(spec.local_shape(ctx), device=ctx.device)
        load([(spec.name, spec, whole)])
        matrix.take(whole)
