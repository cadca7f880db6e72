"""What predicts the second token after each, the third, ...: modules one behind the other, or heads side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import BlockKind, ahead_of, blocks_of
from megaforge.models.ahead import Drafts, Ends, MultiToken, Pack, Prediction
from megaforge.models.generation_state import GenerationState
from megaforge.nn.block import Block
from megaforge.nn.head import EMBEDDING, OutputHead, ends_init
from megaforge.nn.moe import RouterLosses
from megaforge.nn.norms import make_norm
from megaforge.nn.recompute import recomputed
from megaforge.nn.sublayer import LayerState
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import RowParallelLinear, VocabParallelEmbedding
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import ParamSpec, make_parameter


class Blocks(nn.Module):
    """Blocks in order: those of one further prediction."""

    def __init__(self, layer: LayerContext, kinds: Sequence[BlockKind], index: int, total: int) -> None:
        """
        Args:
            index: of the first of them; the model's own come before, and initial values and dropout depend on it.
            total: blocks of the model, further predictions' included.
        """
        super().__init__()
        own = [replace(layer, index=index + place, count=total, first=kind.first) for place, kind in enumerate(kinds)]
        self.blocks = nn.ModuleList([Block(*one) for one in zip(own, kinds, strict=True)])

    def forward(
        self, x: Tensor, info: PackedSequence, states: Sequence[LayerState | None] | None = None
    ) -> tuple[Tensor, list[RouterLosses]]:
        """Residual stream [s(/tp), b, h] through them, with the losses of routers. ``states``: of their sublayers."""
        carried: dict[str, Tensor] = {}
        routed: list[RouterLosses] = []
        memory = None if states is None else iter(states)
        for block in cast(list[Block], list(self.blocks)):
            own = (None, None) if memory is None else [next(memory) for _ in block.sublayers]
            x, carried, losses = block(x, info, carried, own)
            routed += losses
        return x, routed

    def new_state(self) -> GenerationState:
        """An empty memory."""
        blocks = cast(list[Block], list(self.blocks))
        return GenerationState([layer.new_state() for block in blocks for _, layer in block.sublayers])


class SequentialDepth(nn.Module):
    """``h' = blocks(W [norm(embedding of a later token) | norm(h)])``, normed."""

    def __init__(self, layer: LayerContext, kinds: Sequence[BlockKind], index: int, total: int) -> None:
        super().__init__()
        width, std = layer.cfg.hidden_size, layer.cfg.init_std * layer.cfg.init_std_scale
        self.region, self.axis = layer.region, layer.ctx.tp
        self.embedding_norm, self.hidden_norm = make_norm(layer), make_norm(layer)
        self.project = RowParallelLinear(layer, 2 * width, width, init=Normal(std / math.sqrt(2)), kind="mtp")
        self.layers = Blocks(layer, kinds, index, total)
        self.final_norm = make_norm(layer)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        info: PackedSequence,
        states: Sequence[LayerState | None] | None = None,
    ) -> tuple[Tensor, list[RouterLosses]]:
        """[s(/tp), b, h] twice -> what the head is given, [s(/tp), b, h], and the losses of routers."""
        both = self.region.enter(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1))
        x, routed = self.layers(self.project(both.chunk(self.axis.size, -1)[self.axis.rank]), info, states)
        out: Tensor = self.final_norm(x)
        return out, routed


class Sequential(MultiToken):
    """Modules one behind the other: each is given what the one before gave the head, at first the model itself, and the
    embedding of one token more (DeepSeek-V3, arXiv 2412.19437, section 2.2; Megatron-LM's order of the two)."""

    reads_tokens = True

    def __init__(self, layer: LayerContext, embedding_weight: nn.Parameter | None = None) -> None:
        """``embedding_weight``: the model's, where this stage has it; None: a copy of its own."""
        super().__init__()
        weight = _copy_of_embedding(layer) if embedding_weight is None else embedding_weight
        self.embedding = VocabParallelEmbedding(layer, init=ends_init(layer.cfg)[0], weight=weight)
        self.depths = nn.ModuleList([SequentialDepth(layer, *place) for place in _places(layer.cfg)])

    def looked_up(self) -> nn.Parameter:
        return self.embedding.weight

    def forward(
        self, ends: Ends, tokens: Sequence[Tensor], targets: Sequence[tuple[Tensor, Tensor]], info: PackedSequence
    ) -> list[Prediction]:
        hidden, found = ends.hidden, []
        for depth, read, target in zip(self.depths, tokens, targets, strict=True):
            hidden, routed = depth(hidden, self.embedding(read), info)
            found.append(Prediction(_loss_sum(ends.head, hidden, *target), routed))
        return found

    def drafts(self, pack: Pack) -> Drafts:
        return SequentialDrafts(self, pack)


class Parallel(MultiToken):
    """Heads side by side: each has blocks of its own on what the model's last block, the head of the next token, is
    given, and shares its norm and its matrix (Gloeckle et al., arXiv 2404.19737, section 2).

    In the backward pass one head after another is computed again, so that the activations and the gradient of one head
    alone exist at a time, however many there are.
    """

    def __init__(self, layer: LayerContext, embedding_weight: nn.Parameter | None = None) -> None:
        """``embedding_weight`` is not read."""
        super().__init__()
        self.depths = nn.ModuleList([Blocks(layer, *place) for place in _places(layer.cfg)])

    def forward(
        self, ends: Ends, tokens: Sequence[Tensor], targets: Sequence[tuple[Tensor, Tensor]], info: PackedSequence
    ) -> list[Prediction]:
        found = []
        for depth, target in zip(self.depths, targets, strict=True):
            loss, routed = recomputed(True, _head_alone, ends.before, depth, ends.final_norm, ends.head, info, *target)
            found.append(Prediction(loss, routed))
        return found

    def drafts(self, pack: Pack) -> Drafts:
        return ParallelDrafts(self, pack)


def _head_alone(
    before: Tensor,
    depth: Blocks,
    final_norm: nn.Module,
    head: OutputHead,
    info: PackedSequence,
    labels: Tensor,
    mask: Tensor,
) -> tuple[Tensor, list[RouterLosses]]:
    x, routed = depth(before, info)
    return _loss_sum(head, final_norm(x), labels, mask), routed


def _loss_sum(head: OutputHead, hidden: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """The gradient of the vocabulary's matrix is formed in the backward pass, so that there is one at a time."""
    losses = head.loss(hidden, labels_BS).losses
    return (losses * mask_BS.t()).sum()


def _places(cfg: ModelConfig) -> Iterator[tuple[tuple[BlockKind, ...], int, int]]:
    """Of each further prediction its blocks, the index of the first of them, and how many blocks there are in all."""
    ahead, own = ahead_of(cfg), len(blocks_of(cfg))
    total = own + sum(map(len, ahead))
    for number, kinds in enumerate(ahead):
        yield kinds, own + number * len(kinds), total


def _copy_of_embedding(layer: LayerContext) -> nn.Parameter:
    """The embedding's matrix on another stage than its own; its gradient is summed with the first's."""
    cfg = layer.cfg
    spec = ParamSpec(
        EMBEDDING,
        (cfg.padded_vocab_size(), cfg.hidden_size),
        ends_init(cfg)[0],
        shard_dim=0,
        role="lookup",
        tied_to=EMBEDDING,
        kind="embedding",
    )
    return make_parameter(spec, layer.ctx, layer.dtype)


class SequentialDrafts:
    """Each module remembers the places of which it has been given all tokens; what it makes of the newest ones, whose
    tokens are drafts themselves, it forgets again."""

    def __init__(self, modules: Sequential, pack: Pack) -> None:
        self._modules, self._pack = modules, pack
        self._depths = cast(list[SequentialDepth], list(modules.depths))
        self._states = [depth.layers.new_state() for depth in self._depths]
        self._waiting: list[Tensor | None] = [None] * len(self._depths)  # what each was given and has not taken in
        self._first: tuple[Tensor, OutputHead] | None = None

    def take(self, ends: Ends, tokens: Sequence[int]) -> None:
        arriving = ends.hidden
        for number, state in enumerate(self._states, start=1):
            arriving = self._given(number, arriving)
            ready = max(0, min(len(arriving), len(tokens) - number - state.length))
            self._waiting[number - 1] = arriving[ready:]
            if not ready:
                arriving = arriving[:0]
                continue
            arriving = self._run(number, arriving[:ready], tokens)
            if number == 1:
                self._first = arriving[-1:], ends.head

    def propose(self, tokens: Sequence[int]) -> list[int]:
        assert self._first is not None
        made, head = self._first
        text = [*tokens, _best(head, made)]
        made = made[:0]
        for number, state in enumerate(self._states[1:], start=2):
            back = state.mark()
            made = self._run(number, self._given(number, made), text)
            back()
            text.append(_best(head, made[-1:]))
        return text[len(tokens) :]

    def _given(self, number: int, arriving: Tensor) -> Tensor:
        waiting = self._waiting[number - 1]
        return arriving if waiting is None else torch.cat([waiting, arriving])

    def _run(self, number: int, hidden: Tensor, tokens: Sequence[int]) -> Tensor:
        state, depth = self._states[number - 1], self._depths[number - 1]
        start = state.length + number
        read = torch.tensor([tokens[start : start + len(hidden)]], device=hidden.device)
        out, _ = depth(hidden, self._modules.embedding(read), self._pack(read, None, state), state.layers)
        state.length += len(hidden)
        return cast(Tensor, out)


class ParallelDrafts:
    """Each head remembers every place."""

    def __init__(self, modules: Parallel, pack: Pack) -> None:
        self._pack, self._depths = pack, cast(list[Blocks], list(modules.depths))
        self._states = [depth.new_state() for depth in self._depths]
        self._best: list[int] = []

    def take(self, ends: Ends, tokens: Sequence[int]) -> None:
        self._best = []
        for depth, state in zip(self._depths, self._states, strict=True):
            places = torch.empty((1, len(ends.before)), dtype=torch.long, device=ends.before.device)
            x, _ = depth(ends.before, self._pack(places, None, state), state.layers)
            state.length += len(x)
            self._best.append(_best(ends.head, ends.final_norm(x[-1:])))

    def propose(self, tokens: Sequence[int]) -> list[int]:
        return list(self._best)


def _best(head: OutputHead, hidden: Tensor) -> int:
    """The likeliest token after one place [1, 1, h]."""
    return int(head.logits(hidden)[0, -1].argmax())
