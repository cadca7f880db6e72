"""The model: embedding, blocks of a mixer and an FFN in any order, final norm, head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.models.head import OutputHead, embedding_init, head_init
from megaforge.models.pattern import BlockKind, blocks_of
from megaforge.nn.attention import KVCache, SelfAttention
from megaforge.nn.mlp import DenseFFN, FFNState
from megaforge.nn.moe import MoEFFN, RouterLosses
from megaforge.nn.norms import make_norm
from megaforge.nn.rwkv7 import RWKV7State, RWKV7TimeMix
from megaforge.nn.sequence import SequenceInfo
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.context_parallel import ContextShards
from megaforge.parallel.layers import VocabParallelEmbedding
from megaforge.parallel.region import TensorParallelRegion


@dataclass(frozen=True)
class ModelOutput:
    """What one micro-batch gives, as sums and counts, so that the caller divides by the global batch's counts.

    Of sequences that the ranks of cp share, each rank has a part of every sum.

    Attributes:
        loss_sum: sum over tokens of loss mask * cross-entropy, in nats.
        load_balance_sum: sum over MoE layers and sequences (see :class:`megaforge.nn.moe.RouterLosses`); 0 without MoE.
        z_loss_sum: sum over MoE layers and tokens; 0 without MoE.
        correct: sum over tokens of loss mask * (the label scored highest); no gradient.
        tokens_per_expert: int64 [MoE layers, E].
    """

    loss_sum: Tensor
    load_balance_sum: Tensor
    z_loss_sum: Tensor
    correct: Tensor
    tokens_per_expert: Tensor


@dataclass
class BlockState:
    """What one block remembers of the tokens seen so far."""

    mixer: RWKV7State | KVCache | None
    ffn: FFNState | None


@dataclass
class GenerationState:
    """What a model remembers between calls of :meth:`HybridModel.logits`: RWKV states and key/value caches."""

    blocks: list[BlockState] = field(default_factory=list)
    length: int = 0


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))`` where there is an FFN."""

    def __init__(
        self,
        ctx: ParallelContext,
        cfg: ModelConfig,
        kind: BlockKind,
        index: int,
        num_layers: int,
        region: TensorParallelRegion,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.kind = kind
        self.mixer_norm = make_norm(cfg, ctx, f"{name}.mixer_norm", region=region, dtype=dtype)
        self.mixer: nn.Module
        if kind.mixer == "rwkv7":
            self.mixer = RWKV7TimeMix(ctx, f"{name}.mixer", cfg, index, num_layers, region, dtype)
        else:
            self.mixer = SelfAttention(ctx, f"{name}.mixer", cfg, num_layers=num_layers, region=region, dtype=dtype)
        self.ffn: nn.Module | None = None
        if kind.ffn is not None:
            self.ffn_norm = make_norm(cfg, ctx, f"{name}.ffn_norm", region=region, dtype=dtype)
            self.ffn = {"dense": DenseFFN, "moe": MoEFFN}[kind.ffn](
                ctx,
                f"{name}.ffn",
                cfg,
                layer_index=index,
                num_layers=num_layers,
                channel_mix=kind.channel_mix,
                region=region,
                dtype=dtype,
            )

    def forward(
        self, x: Tensor, v_first: Tensor | None, info: SequenceInfo, state: BlockState | None
    ) -> tuple[Tensor, Tensor | None, RouterLosses | None]:
        """Residual stream [s(/tp), b, h] through the block.

        ``v_first`` [s, b, h/tp] are the values of the first RWKV block, which later ones lean on; attention passes
        them through.
        """
        memory = None if state is None else state.mixer
        if self.kind.mixer == "rwkv7":
            out, v_first = self.mixer(self.mixer_norm(x), info, v_first, memory)
        else:
            out = self.mixer(self.mixer_norm(x), info, memory)
        x = x + out
        if self.ffn is None:
            return x, v_first, None
        out = self.ffn(self.ffn_norm(x), info, None if state is None else state.ffn)
        out, losses = out if self.kind.ffn == "moe" else (out, None)
        return x + out, v_first, losses


class HybridModel(nn.Module):
    """A causal language model of RWKV-7 and attention blocks with dense or mixture-of-experts FFNs.

    Parameters are not initialised here: call :func:`megaforge.parallel.init.initialize_parameters`. In a 16-bit
    ``dtype`` the residual stream and the projections are in that type (as in Megatron-LM); norms, router, decays,
    states and the loss are in fp32.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        ctx: ParallelContext,
        *,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        cp_comm_type: str = "allgather",
    ) -> None:
        """Raises:
        UserError: the pattern, the vocabulary or a width does not fit the configuration or ``--tp``.
        """
        super().__init__()
        self.cfg = cfg
        self.ctx = ctx
        self.region = TensorParallelRegion(ctx, sequence_parallel)
        self.shards = ContextShards(ctx.cp, cp_comm_type)
        kinds = blocks_of(cfg)
        has_rwkv = any(kind.mixer == "rwkv7" for kind in kinds)
        published = has_rwkv and cfg.normalization == "layernorm" and cfg.untie_embeddings_and_output_weights
        self.embedding = VocabParallelEmbedding(
            ctx,
            "embedding",
            cfg.padded_vocab_size(),
            cfg.hidden_size,
            init=embedding_init(cfg, published_rwkv=published),
            region=self.region,
            dtype=dtype,
        )
        # RWKV-LM's ln0
        self.embedding_norm = (
            make_norm(cfg, ctx, "embedding_norm", region=self.region, dtype=dtype)
            if cfg.normalization == "layernorm"
            else nn.Identity()
        )
        self.layers = nn.ModuleList(
            Block(ctx, cfg, kind, index, len(kinds), self.region, dtype) for index, kind in enumerate(kinds)
        )
        self.final_norm = make_norm(cfg, ctx, "final_norm", region=self.region, dtype=dtype)
        self.head = OutputHead(
            ctx,
            cfg,
            None if cfg.untie_embeddings_and_output_weights else self.embedding.weight,
            init=head_init(cfg, published_rwkv=published),
            region=self.region,
            dtype=dtype,
        )

    def _trunk(
        self, tokens_BS: Tensor, info: SequenceInfo, state: GenerationState | None
    ) -> tuple[Tensor, list[RouterLosses]]:
        """Tokens -> normed residual stream [s(/tp), b, h] and the losses of the MoE layers."""
        x = self.embedding_norm(self.embedding(tokens_BS))
        v_first: Tensor | None = None
        routed: list[RouterLosses] = []
        for index, block in enumerate(self.layers):
            x, v_first, losses = block(x, v_first, info, None if state is None else state.blocks[index])
            if losses is not None:
                routed.append(losses)
        return self.final_norm(x), routed

    def _info(self, tokens_BS: Tensor, document_start_BS: Tensor | None, offset: int = 0) -> SequenceInfo:
        if not self.cfg.reset_at_document_boundaries:
            document_start_BS = None
        batch, length = tokens_BS.shape
        return SequenceInfo(batch, length, tokens_BS.device, document_start_BS, offset, self.shards)

    def forward(
        self, tokens: Tensor, labels: Tensor, loss_mask: Tensor, document_start: Tensor | None = None
    ) -> ModelOutput:
        """The losses of one micro-batch: sums over the tokens that this rank holds, which is all unless cp > 1.

        Every rank of cp gets the same whole sequences and takes its chunks of them.

        Args:
            tokens: int64 [b, s].
            labels: int64 [b, s], the token after each.
            loss_mask: float [b, s], weight of each token's loss.
            document_start: bool [b, s], where documents of a packed sample begin; None: one document each.
        """
        info = self._info(tokens, document_start)
        tokens, labels, loss_mask = (info.local(whole) for whole in (tokens, labels, loss_mask))
        x, routed = self._trunk(tokens, info, None)
        losses, correct = self.head.loss(x, labels)
        mask = loss_mask.t().to(losses.dtype)
        zero = losses.new_zeros(())
        return ModelOutput(
            loss_sum=(losses * mask).sum(),
            load_balance_sum=sum((r.load_balance_sum for r in routed), zero),
            z_loss_sum=sum((r.z_loss_sum for r in routed), zero),
            correct=(correct * mask).sum(),
            tokens_per_expert=torch.stack([r.tokens_per_expert for r in routed])
            if routed
            else tokens.new_zeros((0, self.cfg.num_experts)),
        )

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
            ValueError: the model's sequences are shared by the ranks of cp.
        """
        if self.ctx.cp.size > 1:
            raise ValueError(f"logits are for models that hold whole sequences: cp is {self.ctx.cp.size}, not 1")
        info = self._info(tokens, document_start, 0 if state is None else state.length)
        x, _ = self._trunk(tokens, info, state)
        if state is not None:
            state.length += tokens.shape[1]
        if last_only and not self.region.sequence_parallel:
            x = x[-1:]
        logits = self.head.logits(x)
        return logits[:, -1:] if last_only else logits

    def new_state(self) -> GenerationState:
        """An empty memory; the first tokens given to it decide how many sequences it holds."""
        state = GenerationState()
        for module in self.layers:
            block = cast(Block, module)
            mixer = RWKV7State() if block.kind.mixer == "rwkv7" else KVCache()
            state.blocks.append(BlockState(mixer, FFNState() if block.kind.channel_mix else None))
        return state
