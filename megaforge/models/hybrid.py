"""The model: embedding, blocks of a mixer and an FFN in any order, final norm, head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from megaforge.config.pattern import BlockKind, blocks_of
from megaforge.models.converters import convert
from megaforge.models.generation_state import BlockState, GenerationState
from megaforge.nn.attention import KVCache, SelfAttention
from megaforge.nn.head import OutputHead, embedding_init, head_init
from megaforge.nn.losses import LossTerm, add_terms
from megaforge.nn.mlp import DenseFFN, FFNState
from megaforge.nn.moe import MoEFFN, RouterLosses
from megaforge.nn.norms import make_norm
from megaforge.nn.recompute import recomputed
from megaforge.nn.rwkv7 import RWKV7State, RWKV7TimeMix
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import VocabParallelEmbedding
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters


@dataclass(frozen=True)
class ModelOutput:
    """What one micro-batch gives, of the tokens that this rank holds: all of them unless cp > 1.

    Attributes:
        scored: of each token's label its cross-entropy in nats (fp32; fp64 in an fp64 model), whether it scored
            highest (bool), and the loss mask in the type of the first; [s, b] each. None in a pipeline stage without
            the head.
        terms: loss terms that layers make, as sums over layers and tokens, by name.
        experts: int64 [2, MoE layers, E]: tokens_per_expert and preferred_per_expert of
            :class:`megaforge.nn.moe.RouterLosses`; a pipeline stage's own layers.
    """

    scored: tuple[Tensor, Tensor, Tensor] | None
    terms: dict[str, LossTerm]
    experts: Tensor

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
        return (self.losses_SB * self.mask_SB).sum()

    @property
    def correct(self) -> Tensor:
        """Sum over tokens of loss mask * (the label scored highest); no gradient."""
        return (self._scored()[1] * self.mask_SB).sum()


@dataclass(frozen=True)
class Stream:
    """What goes from block to block, and from one pipeline stage to the next.

    Attributes:
        x: the residual stream [s(/tp), b, h].
        v_first: values of the first RWKV-7 block [s, b, h/tp], which later ones lean on; None in a model without.
    """

    x: Tensor
    v_first: Tensor | None


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))`` where there is an FFN."""

    def __init__(self, layer: LayerContext, kind: BlockKind) -> None:
        super().__init__()
        self.kind = kind
        self.recompute = layer.recompute
        self.mixer_norm = make_norm(layer)
        self.mixer = RWKV7TimeMix(layer) if kind.mixer == "rwkv7" else SelfAttention(layer)
        self.ffn: nn.Module | None = None
        if kind.ffn is not None:
            layer = replace(layer, token_shift=kind.channel_mix)
            self.ffn_norm = make_norm(layer)
            self.ffn = {"dense": DenseFFN, "moe": MoEFFN}[kind.ffn](layer)

    def forward(
        self, x: Tensor, v_first: Tensor | None, info: PackedSequence, state: BlockState | None
    ) -> tuple[Tensor, Tensor | None, RouterLosses | None]:
        """Residual stream [s(/tp), b, h] through the block.

        ``v_first`` [s, b, h/tp] are the values of the first RWKV block, which later ones lean on; attention passes
        them through.
        """
        return recomputed(self.recompute == "full", self._forward, x, v_first, info, state)

    def _forward(
        self, x: Tensor, v_first: Tensor | None, info: PackedSequence, state: BlockState | None
    ) -> tuple[Tensor, Tensor | None, RouterLosses | None]:
        memory = None if state is None else state.mixer
        if self.kind.mixer == "rwkv7":
            out, v_first = self.mixer(self.mixer_norm(x), info, v_first, memory)
        else:
            out = self.mixer(self.mixer_norm(x), info, memory)
        x = x + out
        if self.ffn is None:
            return x, v_first, None
        active = self.recompute == "moe" and self.kind.ffn == "moe"
        out = recomputed(active, self._feed_forward, x, info, None if state is None else state.ffn)
        out, losses = out if self.kind.ffn == "moe" else (out, None)
        return x + out, v_first, losses

    def _feed_forward(self, x: Tensor, info: PackedSequence, state: FFNState | None) -> Any:
        return cast(nn.Module, self.ffn)(self.ffn_norm(x), info, state)


class HybridModel(nn.Module):
    """A causal language model of RWKV-7 and attention blocks with dense or mixture-of-experts FFNs, or the part of it
    that one pipeline stage holds: the stage of the first block has the embedding, that of the last the head.

    ``stage_layers`` are its blocks, ``moe_rows`` its MoE layers' places among the model's ``num_moe_layers``.

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
        self.ctx, self.region, self.shards = layer.ctx, layer.region, layer.shard
        kinds = blocks_of(cfg)
        self.stage_layers = range(len(kinds)) if layers is None else layers
        self.is_first, self.is_last = self.stage_layers.start == 0, self.stage_layers.stop == len(kinds)
        moe_layers = [index for index, kind in enumerate(kinds) if kind.ffn == "moe"]
        self.num_moe_layers = len(moe_layers)
        self.moe_rows = [row for row, index in enumerate(moe_layers) if index in self.stage_layers]
        has_rwkv = any(kind.mixer == "rwkv7" for kind in kinds)
        published = has_rwkv and cfg.normalization == "layernorm" and cfg.untie_embeddings_and_output_weights
        if self.is_first:
            self.embedding = VocabParallelEmbedding(layer, init=embedding_init(cfg, published_rwkv=published))
            layernorm = cfg.normalization == "layernorm"  # then RWKV-LM's ln0
            self.embedding_norm = make_norm(layer) if layernorm else nn.Identity()
            embedding_weight = self.embedding.weight
        # By their places in the whole model, which makes a parameter's path the same on every stage.
        self.layers = nn.ModuleDict(
            {
                str(index): Block(replace(layer, index=index, count=len(kinds)), kinds[index])
                for index in self.stage_layers
            }
        )
        if self.is_last:
            self.final_norm = make_norm(layer)
            tied = not cfg.untie_embeddings_and_output_weights
            init = (embedding_init if tied else head_init)(cfg, published_rwkv=published)
            self.head = OutputHead(layer, embedding_weight if tied else None, init=init, tied=tied)
        convert(self, cfg.converters, layer.ctx)
        name_parameters(self)

    @property
    def chunks(self) -> list[HybridModel]:
        """The stages that this rank holds, as :class:`megaforge.models.stages.ModelChunks` has several."""
        return [self]

    def _trunk(
        self, tokens_BS: Tensor, info: PackedSequence, state: GenerationState | None, arrived: Stream | None = None
    ) -> tuple[Stream, list[RouterLosses]]:
        """Tokens, or what an earlier stage made of them, through the blocks; with the losses of the MoE layers."""
        if arrived is None:
            arrived = Stream(self.embedding_norm(self.embedding(tokens_BS)), None)
        x, v_first = arrived.x, arrived.v_first
        routed: list[RouterLosses] = []
        for index, block in enumerate(self.layers.values()):
            x, v_first, losses = block(x, v_first, info, None if state is None else state.blocks[index])
            if losses is not None:
                routed.append(losses)
        return Stream(x, v_first), routed

    def _info(
        self, tokens_BS: Tensor, document_start_BS: Tensor | None, state: GenerationState | None = None
    ) -> PackedSequence:
        if not self.cfg.reset_at_document_boundaries:
            document_start_BS = None
        batch, length = tokens_BS.shape
        offset, padding = (0, None) if state is None else (state.length, state.padding_B)
        return PackedSequence(batch, length, tokens_BS.device, document_start_BS, offset, self.shards, padding)

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
        return self.run_stage(tokens, labels, loss_mask, document_start)[0]

    def run_stage(
        self,
        tokens: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        document_start: Tensor | None = None,
        *,
        arrived: Stream | None = None,
    ) -> tuple[ModelOutput, Stream]:
        """:meth:`forward` of one pipeline stage: what it adds, and what the next stage goes on from.

        Args:
            arrived: what the stage before made; None in the first.
        """
        info = self._info(tokens, document_start)
        tokens, labels, loss_mask = (info.local(whole) for whole in (tokens, labels, loss_mask))
        stream, routed = self._trunk(tokens, info, None, arrived)
        scored = None
        if self.is_last:
            losses, correct = self.head.loss(self.final_norm(stream.x), labels)
            scored = losses, correct, loss_mask.t().to(losses.dtype)
        terms: dict[str, LossTerm] = {}
        for layer in routed:
            add_terms(terms, layer.terms(self.cfg))
        counts = [torch.stack([r.tokens_per_expert, r.preferred_per_expert]) for r in routed]
        experts = torch.stack(counts, dim=1) if counts else tokens.new_zeros((2, 0, self.cfg.num_experts))
        return ModelOutput(scored, terms, experts), stream

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
        arrived: Stream | None = None,
    ) -> tuple[Tensor | None, Stream]:
        """:meth:`logits` of one pipeline stage: scores in the last, None in others; and what the next goes on from."""
        if self.ctx.cp.size > 1:
            raise ValueError(f"logits are for models that hold whole sequences: cp is {self.ctx.cp.size}, not 1")
        info = self._info(tokens, document_start, state)
        stream, _ = self._trunk(tokens, info, state, arrived)
        if state is not None:
            state.length += tokens.shape[1]
        if not self.is_last:
            return None, stream
        x = self.final_norm(stream.x)
        if last_only and not self.region.sequence_parallel:
            x = x[-1:]
        logits = self.head.logits(x)
        return logits[:, -1:] if last_only else logits, stream

    def new_state(self) -> GenerationState:
        """An empty memory; the first tokens given to it decide how many sequences it holds."""
        state = GenerationState()
        for module in self.layers.values():
            block = cast(Block, module)
            mixer = RWKV7State() if block.kind.mixer == "rwkv7" else KVCache()
            state.blocks.append(BlockState(mixer, FFNState() if block.kind.channel_mix else None))
        return state
