"""What a block needs to go on with texts, measured as :mod:`megaforge.planning.measure` does: its own code reads
prompts, and a token more of each, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from megaforge.models.hybrid import HybridModel
from megaforge.nn.block import Block
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.layers import linears
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.planning.costs import carried_before
from megaforge.planning.counting_group import Sent, counting_context
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.meter import MetaRun, fused_attention
from megaforge.planning.stages import ModelParts


class Texts(NamedTuple):
    """
    Attributes:
        rows: prompts that are read together.
        piece: tokens of each that are.
        places: that caches have room for from the beginning.
        length: tokens of a text in the end.
    """

    rows: int
    piece: int
    places: int
    length: int


@dataclass(frozen=True)
class Continuing:
    """
    Attributes:
        state: bytes that the block remembers of a text.
        reading: the most alive besides, while prompts are read.
        step: what is sent for a token of each of the rows, by axis.
    """

    state: float
    reading: float
    step: Sent


def continuing(parts: ModelParts, layout: PlannedLayout, index: int, texts: Texts) -> Continuing:
    """Of block ``index``, measured once for layouts and blocks that do not differ in what it depends on. Whole
    sequences are on every rank of tp, and each token goes through the block (of Mixture of Depths too)."""
    sizes = {"tp": layout.tp, "ep": layout.ep, "etp": layout.etp}
    key = ("continuing", parts.blocks[index].kind, tuple(sizes.values()), layout.dtype, layout.wkv_backend, texts)
    if key not in parts.measured:
        parts.measured[key] = _measure(parts, layout, index, texts, sizes)
    found: Continuing = parts.measured[key]
    return found


@torch.no_grad()
def _measure(parts: ModelParts, layout: PlannedLayout, index: int, texts: Texts, sizes: dict[str, int]) -> Continuing:
    with counting_context("meta", False, **sizes) as (ctx, sent):
        layer = make_layer_context(
            parts.cfg, ctx, sequence_parallel=False, dtype=layout.dtype, backends={"wkv": layout.wkv_backend}
        )
        [block] = HybridModel(layer, range(index, index + 1)).blocks
        block.eval()
        for _, linear in linears(block):
            linear.op.make_ready(linear.matrix)  # kept: no state
        meter = MetaRun(block.parameters())
        with meter, fused_attention():
            states = Block.new_states(block)
            for state in states:
                if state is not None:
                    state.expect(texts.places)

            def read(length: int, offset: int) -> None:
                info = PackedSequence(texts.rows, length, ctx.device, None, offset)
                x = torch.zeros(length, texts.rows, parts.cfg.hidden_size, dtype=layout.dtype, device=ctx.device)
                alone = replace(layout, rounds=None, cp=1, micro_batch_size=texts.rows, sequence_length=length)
                carried = {
                    name: torch.zeros(shape, dtype=layout.dtype, device=ctx.device)
                    for name, shape in carried_before(parts, alone, index).items()
                }
                Block.forward(block, x, info, carried, states)

            read(texts.piece, 0)
            reading = meter.peak - meter.live
            sent.clear()
            read(1, texts.piece)
            step = dict(sent)
            if texts.length > texts.places:  # caches grow, to no more than twice what is in them
                read(texts.length - texts.piece - 1, texts.piece + 1)
            held = meter.live
    return Continuing(held / texts.rows, reading, step)
