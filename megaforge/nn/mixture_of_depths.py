"""Mixture of Depths (Raposo et al., arXiv 2404.02258): a block that a part of each sequence's tokens goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.config.depth_config import tokens_within
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import BlockKind, blocks_of
from megaforge.errors import UserError
from megaforge.nn.block import Block
from megaforge.nn.losses import LossTerm
from megaforge.nn.sublayer import NOTHING, LayerLosses, LayerState
from megaforge.parallel.init_rules import Constant, Normal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ReplicatedLinear
from megaforge.parallel.mappings import reduce_from_tensor_parallel
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.token_selection import TokenSelection

_LEVELS = 2.0**-14  # of the largest score, to which scores are compared


@dataclass(frozen=True)
class DepthLosses:
    """What a block tells of its choice in training: sums over this cp rank's tokens, the same on every rank of tp.

    Attributes:
        cross_entropy: binary, in nats, of what ``--mod-inference`` says of each token against what was chosen.
        agreed: tokens of which it says what was chosen.
        kept: tokens that it would choose.
    """

    cross_entropy: Tensor
    agreed: Tensor
    kept: Tensor

    def terms(self, cfg: ModelConfig) -> dict[str, LossTerm]:
        """By name; the latter two are only reported."""
        layers = sum(block.capacity is not None for block in blocks_of(cfg))
        return {
            "mod_loss": LossTerm(self.cross_entropy, "tokens", cfg.mod_loss_coeff, layers),
            "mod_agreement": LossTerm(self.agreed, "tokens", 0.0, layers),
            "mod_kept": LossTerm(self.kept, "tokens", 0.0, layers),
        }


def top_places(scores_SB: Tensor, count: int) -> Tensor:
    """The places of the ``count`` highest scores of each sequence, in ascending order: [s, b] -> int64 [count, b].

    Scores that agree to 2^-14 of the largest go by place: equal tokens have equal scores, and rounding, which depends
    on the layout, must not choose between them.
    """
    largest = scores_SB.abs().amax(0).clamp(min=torch.finfo(scores_SB.dtype).tiny)
    levels = (scores_SB / (largest.log2().floor().exp2() * _LEVELS)).round()
    return levels.argsort(dim=0, descending=True, stable=True)[:count].sort(0).values


def _matrix(layer: LayerContext, shape: tuple[int, int], bias: bool) -> ReplicatedLinear:
    """A small matrix on the residual stream; under ``--sequence-parallel`` each rank has a part of its gradient."""
    cfg = layer.cfg
    declared: dict[str, Any] = {"kind": "router", "keep_fp32": True, "tp_partial_grad": layer.region.sequence_parallel}
    init = Normal(cfg.init_std * cfg.init_std_scale)
    weight = layer.parameter(shape, init, role="matrix", update="elementwise", **declared)
    added = layer.parameter(shape[:1], Constant(0.0), weight_decay=False, **declared) if bias else None
    return ReplicatedLinear(weight, added)


class Predictor(nn.Module):
    """A small network beside the router, which no gradient leaves: it says from a token alone whether it will be among
    the highest of its sequence. It corrects the router's own score."""

    def __init__(self, layer: LayerContext) -> None:
        super().__init__()
        width = max(8, layer.cfg.hidden_size // 16)
        self.up = _matrix(layer, (width, layer.cfg.hidden_size), bias=True)
        self.down = _matrix(layer, (1, width), bias=True)

    def forward(self, normed: Tensor, scores: Tensor) -> Tensor:
        """[s, b, h] and [s, b] -> [s, b], the logit of a token's being chosen."""
        correction: Tensor = self.down(F.silu(self.up(normed.detach())))
        return scores.detach() + correction.squeeze(-1)


class Threshold(nn.Module):
    """The router itself is trained to score chosen tokens above 0."""

    def __init__(self, layer: LayerContext) -> None:
        super().__init__()

    def forward(self, normed: Tensor, scores: Tensor) -> Tensor:
        """[s, b, h] and [s, b] -> [s, b]."""
        return scores


INFERENCE = {"predictor": Predictor, "threshold": Threshold}


class DepthRouter(nn.Module):
    """Scores tokens, by their direction on the residual stream; and says, from each token alone, which it would choose.
    Never in 16 bit."""

    def __init__(self, layer: LayerContext) -> None:
        super().__init__()
        self.epsilon = layer.cfg.norm_epsilon
        self.score = _matrix(layer, (1, layer.cfg.hidden_size), bias=True)
        self.inference = INFERENCE[layer.cfg.mod_inference](layer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residual stream [s(/tp), b, h] -> scores and logits of the causal choice, [s(/tp), b] each."""
        normed = F.rms_norm(x.to(self.score.weight.dtype), x.shape[-1:], eps=self.epsilon)
        scores = self.score(normed).squeeze(-1)
        return scores, self.inference(normed, scores)


@dataclass
class _Sequence:
    """What the layers of a block remember of one sequence, and how many of its tokens went through it."""

    layers: list[LayerState | None]
    taken: int = 0


@dataclass
class DepthState(LayerState):
    """What a block remembers of each sequence: a sequence's tokens go through it or not, whatever others do."""

    sequences: list[_Sequence] = field(default_factory=list)
    room: int = 0

    def expect(self, tokens: int) -> None:
        self.room = tokens

    @property
    def expected(self) -> int:
        return self.room

    @classmethod
    def side_by_side(cls, states: Sequence[DepthState], length: int) -> DepthState:
        return cls([one for state in states for one in state.sequences], max(state.room for state in states))

    def select(self, rows: Tensor) -> DepthState:
        first = torch.zeros(1, dtype=torch.long, device=rows.device)
        chosen = [self.sequences[row] for row in rows.tolist()]
        copies = [
            _Sequence([None if layer is None else layer.select(first) for layer in one.layers], one.taken)
            for one in chosen
        ]
        return DepthState(copies, self.room)

    def contents(self) -> Iterator[Tensor]:
        for one in self.sequences:
            for layer in one.layers:
                if layer is not None:
                    yield from layer.contents()

    def mark(self) -> Callable[[], None]:
        known = [
            (one, one.taken, [layer.mark() for layer in one.layers if layer is not None]) for one in self.sequences
        ]

        def back() -> None:
            self.sequences = [one for one, _, _ in known]
            for one, taken, marks in known:
                one.taken = taken
                for layer in marks:
                    layer()

        return back

    def slots(self, rows: int, places: int) -> DepthState:
        raise UserError(
            "--cuda-graph: blocks of --mod-capacity-factor choose tokens on the host, which no graph holds; leave it "
            "out"
        )


class MixtureOfDepths(Block):
    """``x + g f(x)`` for the tokens that go through the block, where f is what its layers add and g the sigmoid of the
    router's score; ``x`` for the others. The tokens that go through it see no others in it, in their order and with
    their positions.

    In training a share of each sequence's tokens, those of the highest scores, goes through it, so that a token's fate
    depends on later ones. Everywhere else each token is chosen by itself (``--mod-inference``), however many that are:
    in evaluation and in generation, which agree.
    """

    def __init__(self, layer: LayerContext, kind: BlockKind) -> None:
        assert kind.capacity is not None
        super().__init__(replace(layer, token_share=kind.capacity), kind)
        self.capacity, self.shards = kind.capacity, layer.shard
        self.router = DepthRouter(layer)

    def new_states(self) -> list[LayerState | None]:
        """One for the whole block, in its mixer's place."""
        return [DepthState(), *(None for _ in self.sublayers[1:])]

    def forward(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        states: Sequence[LayerState | None] = (None, None),
    ) -> tuple[Tensor, dict[str, Tensor], list[LayerLosses]]:
        """See :class:`Block`."""
        scores, logits = self.router(x)
        if isinstance(states[0], DepthState):
            return self._continued(x, info, carried, states[0], scores, logits), dict(carried), []
        chosen = self._highest(scores) if self.training else self._by_themselves(logits)
        taken = chosen.take(x)
        inside = {name: chosen.take_inside(tensor) for name, tensor in carried.items()}
        made, _, losses = super().forward(taken, info.select(chosen.indices_SB), inside)
        gate = scores.sigmoid().masked_fill(~chosen.chosen_SB, 0).to(x.dtype)
        if self.training:
            losses = [*losses, self._losses(logits, chosen.chosen_SB)]
        return x + gate.unsqueeze(-1) * chosen.put(made - taken), dict(carried), losses

    def _whole(self, own_SB: Tensor) -> Tensor:
        """Of all tokens of each sequence what this rank knows of its own; not differentiable."""
        return self.shards.gather(self.region.gather(own_SB.detach()))

    def _highest(self, scores: Tensor) -> TokenSelection:
        whole = self._whole(scores)
        places = top_places(whole, tokens_within(self.capacity, len(whole)))
        return TokenSelection(places, len(whole), self.region, self.shards)

    def _by_themselves(self, logits: Tensor) -> TokenSelection:
        """Sequences of one length are made of the chosen tokens, filled up at their ends with others."""
        kept = self._whole(logits) > 0
        counts, unit = (
            kept.sum(0),
            token_unit(self.region.axis.size if self.region.sequence_parallel else 1, self.shards),
        )
        most = max(1, -(-int(counts.max()) // unit)) * unit
        places = (~kept).byte().argsort(dim=0, stable=True)[:most]
        return TokenSelection(places, len(kept), self.region, self.shards, counts)

    def _losses(self, logits: Tensor, chosen_SB: Tensor) -> DepthLosses:
        target = chosen_SB.to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        says = logits.detach() > 0
        sums = torch.stack([loss, (says == chosen_SB).sum().to(loss.dtype), says.sum().to(loss.dtype)])
        if self.region.sequence_parallel:
            sums = reduce_from_tensor_parallel(sums, self.region.axis)
        return DepthLosses(*sums.unbind())

    def _continued(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor],
        state: DepthState,
        scores: Tensor,
        logits: Tensor,
    ) -> Tensor:
        """Goes on with each sequence by itself, with those of its tokens that are chosen."""
        if not state.sequences:
            state.sequences = [_Sequence(super(MixtureOfDepths, self).new_states()) for _ in range(x.shape[1])]
            for layer in (layer for one in state.sequences for layer in one.layers if layer is not None):
                layer.expect(state.room)
        out = x.clone()
        for row, (one, kept) in enumerate(zip(state.sequences, (logits > 0).unbind(1), strict=True)):
            places = kept.nonzero().squeeze(1)
            if not len(places):
                continue
            own = PackedSequence(1, len(places), x.device, offset=one.taken)
            own.position_ids_BS = info.position_ids_BS[row : row + 1, places]
            taken = x[places, row : row + 1]
            inside = {name: tensor[places, row : row + 1] for name, tensor in carried.items()}
            made, _, _ = super().forward(taken, own, inside, one.layers)
            gate = scores[places, row : row + 1].sigmoid().to(x.dtype).unsqueeze(-1)
            out[places, row : row + 1] = taken + gate * (made - taken)
            one.taken += len(places)
        return out


def token_unit(sharers: int, shards: Any) -> int:
    """What the number of tokens has to be a multiple of where ``sharers`` ranks of tp cut each chunk."""
    return sharers * (2 * shards.axis.size if shards.axis.size > 1 else 1)
