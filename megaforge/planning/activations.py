"""Bytes that one micro-batch's forward pass keeps for its backward pass, tensor by tensor, as the layers keep them."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import BlockKind
from megaforge.kernels.wkv7 import saved_for_backward
from megaforge.nn.rwkv7 import lora_ranks
from megaforge.parallel.cross_entropy import CHUNK_TOKENS
from megaforge.planning.layout import PlannedLayout

INDEX = 8  # bytes of an int64
SHORT_INDEX = 4  # and of the kernels' int32
Saved = dict[str, float]  # what -> bytes


@dataclass(frozen=True)
class Sizes:
    """What the formulas are made of: tokens, widths on one rank, bytes of an element."""

    cfg: ModelConfig
    layout: PlannedLayout

    @property
    def tokens(self) -> int:
        return self.layout.tokens

    @property
    def residual(self) -> float:
        """Bytes of the residual stream."""
        return self.layout.residual_tokens * self.cfg.hidden_size * self.layout.element_size

    @property
    def inside(self) -> float:
        """Bytes of the residual stream inside the tensor-parallel region, where every rank has every token."""
        return self.tokens * self.cfg.hidden_size * self.layout.element_size

    @property
    def split(self) -> float:
        """Bytes of a tensor as wide as the residual stream whose channels are split over tp."""
        return self.inside / self.layout.tp

    @property
    def routed_tokens(self) -> float:
        """Tokens that this rank routes to experts."""
        return self.tokens / (self.layout.tp if self.layout.shares_tokens else 1)

    @property
    def expert_rows(self) -> float:
        """Rows that this rank's experts compute, when tokens spread evenly over experts."""
        share = self.layout.etp if self.layout.shares_tokens else 1
        return self.routed_tokens * self.cfg.moe_router_topk * share


def norm_saved(sizes: Sizes) -> Saved:
    """A norm of the residual stream."""
    cfg, layout = sizes.cfg, sizes.layout
    statistics = layout.residual_tokens * layout.wide_size
    if cfg.normalization == "rmsnorm":
        return {"residual stream": sizes.residual, "1/rms": statistics}
    widened = sizes.residual * layout.wide_size / layout.element_size
    return {"residual stream": widened, "mean and 1/std": 2 * statistics}


def mixer_saved(sizes: Sizes, kind: BlockKind, first: bool) -> Saved:
    """A mixer and the norm before it; ``first``: the model's first block."""
    saved = norm_saved(sizes)
    return saved | (_rwkv7(sizes, first) if kind.mixer == "rwkv7" else _attention(sizes))


# What a mixer computes again under ``--recompute selective``: what its mixing of tokens keeps besides its inputs and
# outputs.
MIXING_OF_TOKENS = (
    ("log w", "a, b", "WKV states", "summaries of all chunks")  # RWKV-7
    + ("log-sum-exp", "keys and values of all cp ranks", "context of each chunk")  # attention
)


def mixing_saved(sizes: Sizes, kind: BlockKind, first: bool) -> float:
    """Bytes that the mixing of tokens keeps."""
    saved = mixer_saved(sizes, kind, first)
    return sum(saved.get(what, 0.0) for what in MIXING_OF_TOKENS)


def _rwkv7(sizes: Sizes, first: bool) -> Saved:
    cfg, layout, ranks = sizes.cfg, sizes.layout, lora_ranks(sizes.cfg)
    wide = sizes.split * layout.wide_size / layout.element_size
    heads = cfg.hidden_size // cfg.rwkv_head_size / layout.tp
    sequence = sizes.tokens // layout.micro_batch_size
    state = layout.micro_batch_size * heads * cfg.rwkv_head_size**2 * layout.wide_size
    lora = ranks.decay + ranks.iclr + ranks.gate + (0 if first else ranks.value)
    saved = {
        "input and its shift": 2 * sizes.inside,
        "token-shift mixes": 6 * sizes.inside,
        "inside the LoRAs": sizes.tokens * lora * layout.element_size,
        "r, key, v, decay, rate, gate": 6 * sizes.split,
        "k": sizes.split,
        "a, b": 2 * sizes.split,
        "log w": wide,
        "WKV states": layout.micro_batch_size
        * heads
        * layout.wide_size
        * saved_for_backward(sequence, cfg.rwkv_head_size, layout.device_type),
        "y and its norm": 2 * wide + 2 * sizes.tokens * heads * layout.wide_size,
        "bonus": sizes.split + sizes.tokens * heads * layout.wide_size,
        "ungated and gated output": 2 * sizes.split,
    }
    if layout.cp > 1:
        # P and Q of the 2 cp chunks of each sequence; and this rank has two chunks, each with a first state.
        saved["summaries of all chunks"] = (2 * 2 * layout.cp + 1) * state
    if not first:
        rounded = sizes.split if layout.element_size != layout.wide_size else 0
        saved["value residual"] = sizes.split + wide + rounded
    return saved


def _attention(sizes: Sizes) -> Saved:
    cfg, layout = sizes.cfg, sizes.layout
    scale = sizes.tokens * layout.element_size / layout.tp
    queries, shared = cfg.num_attention_heads * cfg.head_dim, cfg.query_groups * cfg.head_dim
    saved = {
        "input": sizes.inside,
        "q, k, v": scale * (queries + 2 * shared),
        "context": scale * queries,
        "log-sum-exp": sizes.tokens * cfg.num_attention_heads / layout.tp * layout.wide_size,
    }
    if cfg.position_embedding_type == "rope":
        saved["rotated q, k"] = scale * (queries + shared)
    if layout.cp > 1 and layout.cp_comm_type == "allgather":
        saved["keys and values of all cp ranks"] = scale * 2 * shared * layout.cp
        saved["context of each chunk"] = scale * queries
        if layout.recompute != "selective":  # this rank's own keys and values live on in all ranks' only
            del saved["q, k, v"]
    return saved


def ffn_saved(sizes: Sizes, kind: BlockKind) -> Saved:
    """An FFN and the norm before it."""
    if kind.ffn is None:
        return {}
    saved = norm_saved(sizes)
    if kind.channel_mix:
        saved["shift less input"] = sizes.inside
    return saved | (_experts(sizes) if kind.ffn == "moe" else _dense(sizes))


def _inner(cfg: ModelConfig) -> int:
    """Tensors of the inner width that an activation and the product behind it keep."""
    return 3 if cfg.activation == "swiglu" else 2


def _dense(sizes: Sizes) -> Saved:
    cfg, layout = sizes.cfg, sizes.layout
    inner = sizes.tokens * cfg.ffn_size / layout.tp * layout.element_size
    return {"input": sizes.inside, "inner": _inner(cfg) * inner}


def _experts(sizes: Sizes) -> Saved:
    cfg, layout = sizes.cfg, sizes.layout
    rows = sizes.expert_rows
    inner = rows * cfg.ffn_size / layout.etp * layout.element_size
    routed, topk = sizes.routed_tokens, cfg.moe_router_topk
    assignments = routed * topk
    return {
        "router's input": routed * cfg.hidden_size * layout.wide_size,
        "logits, log-sum-exp": routed * (cfg.num_experts + 1) * layout.wide_size,
        "experts and their order": 2 * assignments * SHORT_INDEX,
        "rows of experts": rows * cfg.hidden_size * layout.element_size,
        "inner": (_inner(cfg) + 1) * inner,
        "weights": rows * layout.element_size,
    }


def ends_saved(sizes: Sizes, *, first: bool, last: bool) -> Saved:
    """The embedding (``first``), and final norm, head and loss (``last``)."""
    layout, saved = sizes.layout, Saved()
    if first:
        elsewhere = sizes.tokens if layout.tp > 1 else 0
        saved |= {"tokens": sizes.tokens * INDEX, "rows of other ranks": elsewhere}
        if sizes.cfg.normalization == "layernorm":
            saved |= {f"embedding norm: {what}": size for what, size in norm_saved(sizes).items()}
    if last:
        saved |= {f"final norm: {what}": size for what, size in norm_saved(sizes).items()}
        saved["head's input"] = sizes.inside
        saved["labels, losses, mask"] = sizes.tokens * (INDEX + 2 * layout.wide_size)
    return saved


def shared_saved(sizes: Sizes, attention: bool) -> Saved:
    """What the blocks of a stage share for one micro-batch; ``attention``: whether any of them is attention."""
    cfg, layout, saved = sizes.cfg, sizes.layout, Saved()
    length = layout.sequence_length
    if attention and cfg.position_embedding_type == "rope":
        channels = int(cfg.head_dim * cfg.rotary_percent) // 2 * 2
        saved["rotary tables"] = sizes.tokens * channels * layout.element_size
    if attention and layout.cp > 1 and layout.cp_comm_type == "allgather":
        saved["mask"] = length * length / layout.cp
    if layout.recompute in ("full", "moe"):
        saved["positions"] = 2 * length * INDEX + length * layout.micro_batch_size
    return saved


def block_kept(sizes: Sizes, kind: BlockKind, first: bool) -> float:
    """Bytes that one block keeps until its backward pass under ``--recompute``."""
    recompute = sizes.layout.recompute
    if recompute == "full":
        return sizes.residual
    mixer, ffn = sum(mixer_saved(sizes, kind, first).values()), sum(ffn_saved(sizes, kind).values())
    if recompute == "selective":
        mixer -= mixing_saved(sizes, kind, first)
    if recompute == "moe" and kind.ffn == "moe":
        ffn = sizes.residual
    return mixer + ffn


def recomputed_at_once(sizes: Sizes, kind: BlockKind, first: bool) -> float:
    """Bytes that the backward pass of one block brings back for a while: what is computed again at once."""
    recompute = sizes.layout.recompute
    mixer, ffn = sum(mixer_saved(sizes, kind, first).values()), sum(ffn_saved(sizes, kind).values())
    if recompute == "selective":
        return mixing_saved(sizes, kind, first)
    again = {"none": 0.0, "moe": ffn if kind.ffn == "moe" else 0.0, "full": mixer + ffn}[recompute]
    return max(0.0, again - sizes.residual) if again else 0.0


def weight_gradients_wait_for(sizes: Sizes, kind: BlockKind) -> float:
    """Bytes of gradients that a block's weights wait for between the halves of a split backward pass: of the outputs
    of every operation with a weight."""
    cfg, layout, ranks = sizes.cfg, sizes.layout, lora_ranks(sizes.cfg)
    wide = sizes.split * layout.wide_size / layout.element_size
    if kind.mixer == "rwkv7":
        lora = sizes.tokens * (ranks.decay + ranks.iclr + ranks.gate + ranks.value) * layout.element_size
        # Token-shift mixes; r, k, v and four LoRAs; log w, k, a and b; what scales the norm of each head.
        mixer = 6 * sizes.inside + 7 * sizes.split + lora + (wide + 3 * sizes.split) + wide
    else:
        channels = (cfg.num_attention_heads + 2 * cfg.query_groups) * cfg.head_dim
        mixer = sizes.tokens * channels / layout.tp * layout.element_size
    mixer += sizes.residual + sizes.inside  # of the norm and of the output projection
    if kind.ffn is None:
        return mixer
    ffn = sizes.residual + (sizes.inside if kind.channel_mix else 0.0)
    width = cfg.ffn_size * (_inner(cfg) - 1)
    if kind.ffn == "moe":
        return mixer + ffn + sizes.expert_rows * (width / layout.etp + cfg.hidden_size) * layout.element_size
    return mixer + ffn + sizes.tokens * width / layout.tp * layout.element_size + sizes.inside


def working_set(sizes: Sizes, kind: BlockKind) -> float:
    """Bytes of temporaries at the worst moment of a block's backward pass, gradients of its inputs included."""
    cfg, layout = sizes.cfg, sizes.layout
    inner = 0.0
    if kind.ffn == "moe":
        # The gradient of the rows, before and after the activation, and of the inner tensor.
        rows = sizes.expert_rows * layout.element_size
        inner = 2 * rows * cfg.hidden_size + 3 * rows * cfg.ffn_size / layout.etp * (_inner(cfg) - 1)
    elif kind.ffn == "dense":
        inner = 3 * sizes.tokens * cfg.ffn_size / layout.tp * layout.element_size * (_inner(cfg) - 1) + 2 * sizes.inside
    mixing = 6 * sizes.split + 2 * sizes.inside
    if kind.mixer == "rwkv7":
        # Six gradients of mixes, and what WKV-7's backward pass makes.
        wide = sizes.split * layout.wide_size / layout.element_size
        mixing = max(6 * sizes.inside + 8 * sizes.split, WKV_TEMPORARIES * wide)
    return max(inner, mixing) + 2 * sizes.residual


WKV_TEMPORARIES = 8  # of compiled code, in fp32 tensors as wide as this rank's heads; plain torch makes about 40


def head_working_set(sizes: Sizes) -> float:
    """Bytes of temporaries of the head and its loss: a chunk of logits in both types, the gradient of its matrix."""
    cfg, layout = sizes.cfg, sizes.layout
    vocabulary = cfg.padded_vocab_size() / layout.tp
    logits = min(CHUNK_TOKENS, sizes.tokens) * vocabulary * (layout.wide_size + layout.element_size)
    return logits + vocabulary * cfg.hidden_size * (layout.wide_size + layout.element_size) + sizes.inside
