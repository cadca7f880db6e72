"""What each pipeline stage holds: the parameters that the real model declares, and its arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import BlockKind
from megaforge.models.flops import ahead_mixing, head_products, matmul_elements
from megaforge.models.hybrid import HybridModel
from megaforge.models.stages import stage_layers
from megaforge.nn.block import Block
from megaforge.nn.head import EMBEDDING
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import ParamSpec, named_specs
from megaforge.planning.layout import PlannedLayout


@dataclass(frozen=True)
class DeclaredParameter:
    """One parameter as it is declared, and its type."""

    spec: ParamSpec
    dtype: torch.dtype

    @property
    def element_size(self) -> int:
        """Bytes of one of its elements."""
        return self.dtype.itemsize

    @property
    def is_trained(self) -> bool:
        """Whether a rule updates it."""
        return self.spec.role != "state" and not self.spec.frozen


@dataclass(frozen=True)
class BlockParts:
    """One block: its kind, and the parameters of each of its layers and the norm before it."""

    kind: BlockKind
    held: tuple[tuple[DeclaredParameter, ...], ...]


@dataclass(frozen=True)
class ModelParts:
    """The whole model, as declared at construction; sizes at any layout follow from each declaration. ``ahead`` are the
    parameters of further predictions, the embedding included where they read it; ``beside`` those of what converters
    put on the last stage."""

    cfg: ModelConfig
    embedding: tuple[DeclaredParameter, ...]
    blocks: tuple[BlockParts, ...]
    final_norm: tuple[DeclaredParameter, ...]
    head: tuple[DeclaredParameter, ...]
    ahead: tuple[DeclaredParameter, ...] = ()
    beside: tuple[DeclaredParameter, ...] = ()

    @cached_property
    def measured(self) -> dict[object, Any]:
        """What was measured of this model (:mod:`megaforge.planning.costs`), by what it depends on."""
        return {}

    @cached_property
    def _first_of_kind(self) -> tuple[int, ...]:
        first: dict[BlockKind, int] = {}
        return tuple(first.setdefault(block.kind, index) for index, block in enumerate(self.blocks))

    def alike(self, blocks: range) -> Counter[int]:
        """How many of ``blocks`` have the sizes of block i, for the first i of every kind: a model has few kinds of
        block, and the first one with a mixer may be one of its own."""
        return Counter(self._first_of_kind[index] for index in blocks)

    def layers_of(self, blocks: range) -> Iterator[tuple[DeclaredParameter, ...]]:
        """The parameters of the layers of ``blocks``, in order; of alike blocks, those of the first."""
        for index in blocks:
            yield from self.blocks[self._first_of_kind[index]].held

    def head_flops(self, sequence_length: int) -> float:
        """Forward FLOPs of one token's scores, over all ranks, and of all further predictions."""
        cfg = self.cfg
        own = [item.spec for item in self.ahead if item.spec.name != EMBEDDING]
        more = 2.0 * matmul_elements(own, cfg) + head_products(cfg) + ahead_mixing(cfg, sequence_length)
        return 2.0 * cfg.padded_vocab_size() * cfg.hidden_size + more

    def ahead_again(self, sequence_length: int) -> float:
        """Forward FLOPs of one token that the backward pass of further predictions computes again in any case: logits,
        and of heads side by side everything."""
        if self.cfg.mtp_mode == "sequential":
            return head_products(self.cfg)
        return self.head_flops(sequence_length) - 2.0 * self.cfg.padded_vocab_size() * self.cfg.hidden_size

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward FLOPs of one token, recomputation not counted; frozen matrices have no gradient."""
        held = [item for block in self.blocks for layer in block.held for item in layer]
        mixing = sum(block.kind.flops(self.cfg, sequence_length) for block in self.blocks)
        products = 2.0 * matmul_elements([item.spec for item in held], self.cfg)
        not_made = 2.0 * matmul_elements([item.spec for item in held if item.spec.frozen], self.cfg)
        return 3.0 * (products + mixing + self.head_flops(sequence_length)) - not_made


@cache
def model_parts(cfg: ModelConfig, dtype: torch.dtype) -> ModelParts:
    """Builds the real model on the meta device and takes down what it declares."""
    model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta"), dtype=dtype))
    blocks = (BlockParts(block.kind, _held_by(block)) for block in model.blocks)
    own = (
        model.embedding,
        model.positions,
        model.embedding_norm,
        model.layers,
        model.final_norm,
        model.head,
        model.mtp,
    )
    return ModelParts(
        cfg,
        _held([module for module in (model.embedding, model.positions, model.embedding_norm) if module is not None]),
        tuple(blocks),
        _held([model.final_norm]),
        _held([model.head]),
        () if model.mtp is None else _held([model.mtp]),
        _held(child for child in model.children() if all(child is not one for one in own)),
    )


def _held_by(block: Block) -> tuple[tuple[DeclaredParameter, ...], ...]:
    """Of each of its layers; what a block has besides is the first one's."""
    first, *others = block.sublayers
    layers = {id(module) for pair in block.sublayers for module in pair}
    besides = [module for module in block.children() if id(module) not in layers]
    return (_held([*first, *besides]), *map(_held, others))


def _held(modules: Iterable[nn.Module | torch.Tensor]) -> tuple[DeclaredParameter, ...]:
    pairs = (pair for module in modules if isinstance(module, nn.Module) for pair in named_specs(module))
    return tuple(DeclaredParameter(spec, parameter.dtype) for spec, parameter in pairs)


@dataclass(frozen=True)
class StagePart:
    """One pipeline stage: its blocks, and whether it has the embedding and the head."""

    blocks: range
    first: bool
    last: bool

    @property
    def ends(self) -> tuple[bool, ...]:
        """Which ends of the model it has: False for the embedding, True for the head."""
        return (False,) * self.first + (True,) * self.last


def cut_stages(parts: ModelParts, layout: PlannedLayout) -> tuple[StagePart, ...]:
    """The stages that training would make of the model: :func:`megaforge.models.stages.stage_layers`.

    Raises:
        UserError: there are more stages than blocks, or the pattern's cuts make another number of stages.
    """
    ranges = stage_layers(parts.cfg, layout.pp * layout.vpp, layout.sequence_length)
    last = len(ranges) - 1
    return tuple(StagePart(blocks, index == 0, index == last) for index, blocks in enumerate(ranges))


def stage_parameters(parts: ModelParts, stages: Sequence[StagePart]) -> list[tuple[DeclaredParameter, int]]:
    """The parameters of a rank with these stages, each with the number of blocks that have one like it. A matrix that
    embedding and head share is held once."""
    ends = {}
    counts: Counter[int] = Counter()
    for stage in stages:
        counts.update(parts.alike(stage.blocks))
        held = parts.embedding if stage.first else ()
        held += parts.final_norm + parts.head + parts.ahead + parts.beside if stage.last else ()
        ends.update({item.spec.name: item for item in held})
    own = [(item, 1) for item in ends.values()]
    for index, count in counts.items():
        own += [(item, count) for layer in parts.blocks[index].held for item in layer]
    return own


def chunk_parameters(
    parts: ModelParts, stages: Sequence[StagePart], copies_tied: bool
) -> list[list[DeclaredParameter]]:
    """The parameters of each of a rank's stages, in module order, and last those that several of them share; of alike
    blocks, those of the first.

    Args:
        copies_tied: whether a matrix that is both embedding and head is on two ranks, each of which has a copy.
    """
    chunks: list[list[DeclaredParameter]] = []
    shared: dict[str, DeclaredParameter] = {}
    tied = {item.spec.name for item in parts.embedding} & {item.spec.name for item in (*parts.head, *parts.ahead)}
    both_ends = sum(stage.first for stage in stages) + sum(stage.last for stage in stages) > 1
    for stage in stages:
        chunk = [*parts.embedding] if stage.first else []
        chunk += [item for layer in parts.layers_of(stage.blocks) for item in layer]
        if stage.last:
            ends = {item.spec.name: item for item in (*parts.head, *parts.ahead)}
            chunk += [*parts.final_norm, *(one for name, one in ends.items() if not (stage.first and name in tied))]
            chunk += parts.beside
        if both_ends and not (stage.first and stage.last):
            shared.update({item.spec.name: item for item in chunk if item.spec.name in tied})
            chunk = [item for item in chunk if item.spec.name not in tied]
        elif copies_tied:
            chunk = [_copied(item) if item.spec.name in tied else item for item in chunk]
        chunks.append(chunk)
    return [*chunks, list(shared.values())]


def _copied(item: DeclaredParameter) -> DeclaredParameter:
    """A tied matrix of which another rank has the other copy."""
    return replace(item, spec=replace(item.spec, tied_to=item.spec.name))
