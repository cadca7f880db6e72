"""The model: embedding, blocks of a mixer and an FFN in any order, final norm, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from megaforge.config.expert_layers import ExpertLayers
from megaforge.config.pattern import ahead_of, blocks_of, expert_layers, kinds_of
from megaforge.errors import UserError
from megaforge.models.ahead import Ends, make_multi_token, terms_of
from megaforge.models.converters import convert
from megaforge.models.generation_state import GenerationState
from megaforge.nn.block import Block, make_block
from megaforge.nn.head import OutputHead, ends_init
from megaforge.nn.losses import LossTerm, add_terms
from megaforge.nn.moe import RouterLosses
from megaforge.nn.norms import make_norm
from megaforge.nn.sublayer import NOTHING, LayerLosses
from megaforge.parallel.dropout import EMBEDDING
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import VocabParallelEmbedding
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import give_memory, name_parameters
from megaforge.registry import POSITION_EMBEDDINGS


@dataclass(frozen=True)
class ModelOutput:
    """What one micro-batch gives, of the tokens that this rank holds: all of them unless cp > 1.

    Attributes:
        scored: of each token's label its cross-entropy in nats (fp32; fp64 in an fp64 model), whether it scored
            highest (bool), and the loss mask in the type of the first; [s, b] each. None in a pipeline stage without
            the head.
        terms: loss terms that layers make, as sums over layers and tokens, by name.
        experts: int64 [3, MoE layers, E]: tokens_per_expert, preferred_per_expert and kept_per_expert of
            :class:`megaforge.nn.moe.RouterLosses`; a pipeline stage's own layers. Layers of fewer experts than others
            have zeros at the end.
        layer_terms: the loss terms of each layer that has experts, by its name.
        head_input: the head and what it was given, the normed residual stream [s(/tp), b, h]; None without a head.
        total: :attr:`loss_sum`, where the head has formed its gradients already.
        labels_BS: int64 [b, s]; None without a head.
        info: which tokens of the sequences these are.
    """

    scored: tuple[Tensor, Tensor, Tensor] | None
    terms: dict[str, LossTerm]
    experts: Tensor
    layer_terms: Mapping[str, Mapping[str, LossTerm]]
    head_input: tuple[OutputHead, Tensor] | None = None
    total: Tensor | None = None
    labels_BS: Tensor | None = None
    info: PackedSequence | None = None

    def _scored(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.scored is None:
            raise ValueError("this pipeline stage has no head, so it scores no labels")
        return self.scored

    @property
    def losses_SB(self) -> Tensor:
        """Cross-entropy of each token's label, whether it counts or not."""
        return self._scored()[0]

    @property
    def log_probs_SB(self) -> Tensor:
        """Log-probability of each token's label, likewise."""
        return -self.losses_SB

    @property
    def mask_SB(self) -> Tensor:
        """Weight of each token's loss."""
        return self._scored()[2]

    @property
    def loss_sum(self) -> Tensor:
        """Sum over tokens of loss mask * cross-entropy."""
        return (self.losses_SB * self.mask_SB).sum() if self.total is None else self.total

    @property
    def correct_SB(self) -> Tensor:
        """Whether each token's label scored highest."""
        return self._scored()[1]

    @property
    def correct(self) -> Tensor:
        """Sum over tokens of loss mask * (the label scored highest); no gradient."""
        return (self.correct_SB * self.mask_SB).sum()


class Trunk(NamedTuple):
    """What the blocks of a stage make.

    Attributes:
        sent: the residual stream, and what layers carry, by name.
        losses: that layers make.
        before: the residual stream in front of the last block.
    """

    sent: dict[str, Tensor]
    losses: list[LayerLosses]
    before: Tensor


class HybridModel(nn.Module):
    """A causal language model of RWKV-7 and attention blocks with dense or mixture-of-experts FFNs, or the part of it
    that one pipeline stage holds: the stage of the first block has the embedding, that of the last the head.

    ``stage_layers`` are its blocks, ``moe_rows`` its MoE layers' places among the model's ``num_moe_layers``, of which
    ``experts`` says more.

    Parameters are not initialised here: call :func:`megaforge.parallel.init.initialize_parameters`. In a 16-bit
    ``dtype`` the residual stream and the projections are in that type (as in Megatron-LM); norms, router, decays,
    states and the loss are in fp32.
    """

    def __init__(
        self, layer: LayerContext, layers: range | None = None, embedding_weight: nn.Parameter | None = None
    ) -> None:
        """
        Args:
            layer: what all layers are built from.
            layers: the blocks of this stage; None is the whole model. Parameters have the same global names.
            embedding_weight: a tied head of a stage without the embedding: the first stage's matrix where this rank
                has that stage too. None: the head has a copy of its own.

        Raises:
            UserError: the pattern, the vocabulary or a width does not fit the configuration or ``--tp``, or
                ``--wkv-backend`` cannot run here.
        """
        super().__init__()
        cfg = self.cfg = layer.cfg
        lends = cfg.replaces_weights and not layer.without_memory
        layer = replace(layer, without_memory=layer.without_memory or lends)
        self.ctx, self.region, self.shards, self.dtype = layer.ctx, layer.region, layer.shard, layer.dtype
        kinds = blocks_of(cfg)
        self.stage_layers = range(len(kinds)) if layers is None else layers
        self.is_first, self.is_last = self.stage_layers.start == 0, self.stage_layers.stop == len(kinds)
        moe_layers = expert_layers(cfg)
        self.num_moe_layers = len(moe_layers)
        self.experts = ExpertLayers.of(cfg)
        self.most_experts = max(self.experts.experts, default=0)
        # A slice, for a list would have to be sent to the device each time.
        ends = (
            self.stage_layers.start,
            len(kinds) + sum(map(len, ahead_of(cfg))) if self.is_last else self.stage_layers.stop,
        )
        self.moe_rows = slice(*(sum(index < end for index, _ in moe_layers) for end in ends))
        embedding_init, head_init = ends_init(cfg)
        if self.is_first:
            self.embedding = VocabParallelEmbedding(layer, init=embedding_init)
            self.positions = POSITION_EMBEDDINGS.get(cfg.position_embedding_type).build(layer)
            normed = any(kind.norms_embedding(cfg) for kind in kinds_of(cfg))
            self.embedding_norm = make_norm(layer) if normed else nn.Identity()
            embedding_weight = self.embedding.weight
        # By their places in the whole model, which makes a parameter's path the same on every stage.
        self.layers = nn.ModuleDict(
            {
                str(index): make_block(replace(layer, index=index, count=len(kinds)), kinds[index])
                for index in self.stage_layers
            }
        )
        if self.is_last:
            self.final_norm = make_norm(layer)
            tied = not cfg.untie_embeddings_and_output_weights
            init = embedding_init if tied else head_init
            self.head = OutputHead(layer, embedding_weight if tied else None, init=init, tied=tied)
            self.mtp = make_multi_token(layer, self.head.weight if tied else embedding_weight)
        convert(self, cfg.all_converters, layer.ctx, cfg.peft, cfg.head_converters)
        for parameter in self.parameters() if lends else ():
            give_memory(parameter, layer.ctx.device)
        name_parameters(self)

    @property
    def blocks(self) -> list[Block]:
        """Those of this stage, in order."""
        return cast(list[Block], list(self.layers.values()))

    @property
    def chunks(self) -> list[HybridModel]:
        """The stages that this rank holds, as :class:`megaforge.models.stages.ModelChunks` has several."""
        return [self]

    @property
    def embedding_copy(self) -> nn.Parameter:
        """The embedding's matrix as a last stage reads it (:func:`megaforge.models.ahead.embedding_is_shared`)."""
        if self.cfg.untie_embeddings_and_output_weights:
            assert self.mtp is not None
            return self.mtp.looked_up()
        return self.head.weight

    def _trunk(
        self,
        tokens_BS: Tensor,
        info: PackedSequence,
        state: GenerationState | None = None,
        received: Mapping[str, Tensor] = NOTHING,
    ) -> Trunk:
        """Tokens, or what an earlier stage made of them, through the blocks."""
        carried, losses = dict(received), list[LayerLosses]()
        before = x = carried.pop("x") if carried else self.embedded(tokens_BS, info)
        states = None if state is None else iter(state.layers)
        for block in self.blocks:
            own = (None, None) if states is None else [next(states) for _ in block.sublayers]
            before = x
            x, carried, made = block(x, info, carried, own)
            losses += made
        return Trunk({"x": x, **carried}, losses, before)

    def embedded(self, tokens_BS: Tensor, info: PackedSequence) -> Tensor:
        """The residual stream [s(/tp), b, h] in front of the first block."""
        x = self.embedding(tokens_BS)
        x = x if self.positions is None else self.positions(x, info)
        x = self.embedding_norm(x)
        return x if info.dropout is None else info.dropout.hidden(x, -1, EMBEDDING, self.region)

    def pack(
        self, tokens_BS: Tensor, document_start_BS: Tensor | None, state: GenerationState | None = None
    ) -> PackedSequence:
        """Where documents begin among the whole sequences ``tokens_BS``, for all stages of a rank alike. In host memory
        ``document_start_BS``, bool [b, s], costs a GPU no waiting.

        Raises:
            UserError: the sequences are longer than the model has positions.
        """
        if state is not None and state.place is not None and state.unused_B is not None:
            return PackedSequence.at(state.place, state.unused_B)
        if not self.cfg.reset_at_document_boundaries:
            document_start_BS = None
        batch, length = tokens_BS.shape
        offset, padding = (0, None) if state is None else (state.length, state.padding_B)
        self.check_length(offset + length)
        return PackedSequence(batch, length, tokens_BS.device, document_start_BS, offset, self.shards, padding)

    def check_length(self, tokens: int) -> None:
        """
        Raises:
            UserError: a sequence of so many is longer than the model has positions.
        """
        longest = POSITION_EMBEDDINGS.get(self.cfg.position_embedding_type).longest(self.cfg)
        if longest is not None and tokens > longest:
            raise UserError(
                f"{tokens} tokens in a sequence: the model has positions for {longest} (--max-position-embeddings); "
                "give it fewer"
            )

    def forward(
        self, tokens: Tensor, labels: Tensor, loss_mask: Tensor, document_start: Tensor | None = None
    ) -> ModelOutput:
        """The losses of one micro-batch, of the tokens that this rank holds.

        Every rank of cp gets the same whole sequences and takes its chunks of them.

        Args:
            tokens: int64 [b, s].
            labels: int64 [b, s], the token after each.
            loss_mask: float [b, s], weight of each token's loss.
            document_start: bool [b, s], where documents of a packed sample begin; None: one document each. In host
                memory it costs a GPU no waiting.
        """
        if not (self.is_first and self.is_last):
            raise ValueError(f"blocks {self.stage_layers} are one pipeline stage: call run_stage")
        return self.run_stage(tokens, labels, loss_mask, self.pack(tokens, document_start))[0]

    def run_stage(
        self,
        tokens: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        info: PackedSequence | None = None,
        later: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        received: Mapping[str, Tensor] = NOTHING,
        turns_back: bool = False,
    ) -> tuple[ModelOutput, dict[str, Tensor]]:
        """:meth:`forward` of one pipeline stage: what it adds, and what the next stage goes on from.

        Args:
            info: from :meth:`pack`; None: one document each.
            later: of each further prediction (:mod:`megaforge.models.multi_token`) its labels and loss mask, as above;
                none: they are not made.
            received: what the stage before made; nothing in the first.
            turns_back: a backward pass follows at once, that of :attr:`ModelOutput.loss_sum`: the head forms its
                gradients while it has the logits. Other gradients are right too, but logits are formed again.
        """
        info = self.pack(tokens, None) if info is None else info
        tokens, labels, loss_mask = (info.local(whole) for whole in (tokens, labels, loss_mask))
        sent, losses_made, before = self._trunk(tokens, info, None, received)
        terms: dict[str, LossTerm] = {}
        scored = head_input = total = None
        if self.is_last:
            head_input = self.head, self.final_norm(sent["x"])
            mask_SB = loss_mask.t().to(torch.float64 if self.dtype == torch.float64 else torch.float32)
            # In fp16 the loss scale must be in gradients before they are rounded.
            at_once = turns_back and self.dtype != torch.float16
            losses, correct, total = self.head.loss(head_input[1], labels, mask_SB if at_once else None)
            scored = losses, correct, mask_SB
            if later and self.mtp is not None:
                made = Ends(before, head_input[1], self.final_norm, self.head)
                more = [(info.local(one), info.local(mask).to(mask_SB.dtype)) for one, mask in later]
                predictions = self.mtp(made, [labels, *(one for one, _ in more[:-1])], more, info)
                terms = terms_of(predictions, self.cfg)
                losses_made = [*losses_made, *(layer for one in predictions for layer in one.routed)]
        told = [(layer, layer.terms(self.cfg)) for layer in losses_made]
        for _, own in told:
            add_terms(terms, own)
        routed = [(layer, own) for layer, own in told if isinstance(layer, RouterLosses)]
        # Layers of predictions that were not made have routed nothing.
        experts = tokens.new_zeros((3, self.moe_rows.stop - self.moe_rows.start, self.most_experts))
        for place, (layer, _) in enumerate(routed):
            experts[:, place] = layer.counts(self.most_experts)
        layer_terms = {name: own for name, (_, own) in zip(self.experts.names[self.moe_rows], routed, strict=False)}
        scored_labels = labels if self.is_last else None
        return ModelOutput(scored, terms, experts, layer_terms, head_input, total, scored_labels, info), sent

    def head_input(self, tokens: Tensor, info: PackedSequence) -> Tensor:
        """What the head of a whole model is given of ``tokens`` int64 [b, s]: the normed residual stream
        [s(/tp), b, h], of the tokens that this rank holds."""
        out: Tensor = self.final_norm(self._trunk(info.local(tokens), info).sent["x"])
        return out

    def logits(
        self,
        tokens: Tensor,
        document_start: Tensor | None = None,
        state: GenerationState | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Scores of the next token, whole on every rank.

        Args:
            tokens: int64 [b, s].
            document_start: as in :meth:`forward`; only without ``state``.
            state: from :meth:`new_state`; the tokens continue those it has seen, and it takes them in.
            last_only: scores after the last token only.

        Returns:
            [b, s, vocabulary] ([b, 1, vocabulary]) in the dtype of the model.

        Raises:
            ValueError: the model's sequences are shared by the ranks of cp, or this is a stage of it.
        """
        if not (self.is_first and self.is_last):
            raise ValueError(f"blocks {self.stage_layers} are one pipeline stage: call stage_logits")
        logits, _ = self.stage_logits(tokens, document_start, state, last_only=last_only)
        assert logits is not None
        return logits

    def stage_logits(
        self,
        tokens: Tensor,
        document_start: Tensor | None = None,
        state: GenerationState | None = None,
        *,
        last_only: bool = False,
        received: Mapping[str, Tensor] = NOTHING,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """:meth:`logits` of one pipeline stage: scores in the last, None in others; and what the next goes on from."""
        ends, sent = self.stage_ends(tokens, document_start, state, received=received)
        if ends is None:
            return None, sent
        x = ends.hidden
        if last_only and not self.region.sequence_parallel:
            x = x[-1:]
        logits = self.head.logits(x)
        return logits[:, -1:] if last_only else logits, sent

    def stage_ends(
        self,
        tokens: Tensor,
        document_start: Tensor | None = None,
        state: GenerationState | None = None,
        *,
        received: Mapping[str, Tensor] = NOTHING,
    ) -> tuple[Ends | None, dict[str, Tensor]]:
        """What the head and further predictions of the last stage are given, None in others; the rest is as
        :meth:`stage_logits`."""
        if self.ctx.cp.size > 1:
            raise ValueError(f"logits are for models that hold whole sequences: cp is {self.ctx.cp.size}, not 1")
        info = self.pack(tokens, document_start, state)
        sent, _, before = self._trunk(tokens, info, state, received)
        if state is not None:
            state.length += tokens.shape[1]
            if state.unused_B is None:
                state.unused_B = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
        if not self.is_last:
            return None, sent
        return Ends(before, self.final_norm(sent["x"]), self.final_norm, self.head), sent

    def new_state(self) -> GenerationState:
        """An empty memory; the first tokens given to it decide how many sequences it holds."""
        return GenerationState([state for block in self.blocks for state in block.new_states()])
