"""One block of the model: a mixer and an FFN around the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from megaforge.config.pattern import BlockKind
from megaforge.nn.norms import make_norm
from megaforge.nn.recompute import recomputed
from megaforge.nn.sublayer import NOTHING, LayerLosses, LayerOutput, LayerState
from megaforge.parallel.dropout import UPDATES
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.registry import BLOCKS


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))`` where there is an FFN."""

    def __init__(self, layer: LayerContext, kind: BlockKind) -> None:
        super().__init__()
        self.kind, self.recompute = kind, layer.recompute
        self.index, self.region = layer.index, layer.region
        self.compiled = False  # see megaforge.training.compiled
        self.mixer_norm = make_norm(layer)
        self.mixer = kind.mixer.build(layer)
        if kind.ffn is not None:
            layer = replace(layer, token_shift=kind.mixer.token_shift)
            self.ffn_norm = make_norm(layer)
            self.ffn = kind.ffn.build(layer)

    @property
    def sublayers(self) -> list[tuple[nn.Module, Any]]:
        """Its mixer and, if it has one, its FFN, each behind its norm."""
        mixer = (self.mixer_norm, self.mixer)
        return [mixer] if self.kind.ffn is None else [mixer, (self.ffn_norm, self.ffn)]

    def forward(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        states: Sequence[LayerState | None] = (None, None),
    ) -> tuple[Tensor, dict[str, Tensor], list[LayerLosses]]:
        """Residual stream [s(/tp), b, h] through the block.

        Args:
            carried: what earlier blocks have made for later ones.
            states: of the sublayers; they take the tokens in.

        Returns:
            The residual stream, what later blocks find in ``carried``, and the losses that its layers make.
        """
        whole = self.recompute == "full"
        return recomputed(whole, self._forward, x, info, tuple(carried), states, *carried.values())

    def _forward(
        self,
        x: Tensor,
        info: PackedSequence,
        names: tuple[str, ...],
        states: Sequence[LayerState | None],
        *carried: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], list[LayerLosses]]:
        known, losses = dict(zip(names, carried, strict=True)), list[LayerLosses]()
        update: Tensor | None = None  # not yet added to x
        for place, (kind, (norm, module)) in enumerate(zip(self.kind.layers, self.sublayers, strict=True)):
            alone = self.recompute == kind.recompute
            if alone or self.compiled or not getattr(norm, "takes_update", False):
                # A part that is computed again keeps one tensor: the sum.
                x = x if update is None else x + update
                given = (place, x, info, tuple(known), states[place], *known.values())
                update, made, own = recomputed(alone, self.update, *given)
            else:
                normed, x = norm(x, update)
                update, made, own = module(normed, info, known, states[place])
            if info.dropout is not None:
                update = info.dropout.hidden(update, self.index, UPDATES + place, self.region)
            known.update(made)
            losses += [] if own is None else [own]
        return x if update is None else x + update, known, losses

    def update(
        self,
        place: int,
        x: Tensor,
        info: PackedSequence,
        names: tuple[str, ...] = (),
        state: LayerState | None = None,
        *carried: Tensor,
    ) -> LayerOutput:
        """What sublayer ``place`` adds to the residual stream; ``carried`` tensors have these ``names``."""
        norm, module = self.sublayers[place]
        output: LayerOutput = module(norm(x), info, dict(zip(names, carried, strict=True)), state)
        return output

    def new_states(self) -> list[LayerState | None]:
        """Memories of no tokens, one a sublayer; None of one that sees each token alone."""
        return [module.new_state() for _, module in self.sublayers]


def make_block(layer: LayerContext, kind: BlockKind) -> Block:
    """The block that ``kind`` describes, at the place in the model that ``layer`` says."""
    made: Block = BLOCKS.get(kind.style)(replace(layer, first=kind.first), kind)
    return made
