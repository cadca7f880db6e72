"""The two ends of the model: initial weights of embedding and head, and the output head over a split vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import kinds_of
from megaforge.errors import UserError
from megaforge.parallel.cross_entropy import ScoredLabels, vocab_parallel_linear_cross_entropy
from megaforge.parallel.divergence import vocab_parallel_linear_divergence
from megaforge.parallel.init_rules import InitRule, Normal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import Linear
from megaforge.parallel.linear_op import PlainLinear
from megaforge.parallel.mappings import gather_from_tensor_parallel, reduce_from_tensor_parallel
from megaforge.parallel.param_spec import ParamSpec, make_parameter

EMBEDDING = "embedding.weight"
# A tied head reads a token's own embedding back: where the blocks start at zero, the logit of the input token is
# h * std. Held at 4, its e^4 is lost in a softmax over thousands of tokens, and the loss starts at ln(vocabulary).
TIED_OWN_LOGIT = 4.0


def ends_init(cfg: ModelConfig) -> tuple[InitRule, InitRule]:
    """Initial rules of the embedding and of an untied head: normal, unless a layer of the model brings its own."""
    for kind in kinds_of(cfg):
        own: tuple[InitRule, InitRule] | None = kind.ends_init(cfg)
        if own is not None:
            return own
    std = cfg.init_std
    if not cfg.untie_embeddings_and_output_weights and cfg.bound_tied_embedding:
        std = min(std, TIED_OWN_LOGIT / cfg.hidden_size)
    head = Normal(cfg.init_std * cfg.init_std_scale, cfg.vocab_size)
    return Normal(std * cfg.init_std_scale, cfg.vocab_size), head


class OutputHead(Linear):
    """Scores of the vocabulary, its rows split over tp; the matrix is its own (``head.weight``) or the embedding's."""

    def __init__(
        self, layer: LayerContext, tied_weight: nn.Parameter | None = None, *, init: InitRule, tied: bool = False
    ) -> None:
        """``tied`` without a ``tied_weight``: the embedding is on another pipeline rank, and this is its copy."""
        cfg = layer.cfg
        if tied_weight is None:
            # A copy has the name of what it is a copy of, whatever its path.
            name, kind = (EMBEDDING, "embedding") if tied else ("", "head")
            shape = (cfg.padded_vocab_size(), cfg.hidden_size)
            spec = ParamSpec(
                name,
                shape,
                init,
                shard_dim=0,
                role="lookup" if tied else "matrix",
                update="elementwise",
                tied_to=EMBEDDING if tied else None,
                kind=kind,
            )
            tied_weight = make_parameter(spec, layer.ctx, layer.dtype)
        super().__init__(tied_weight)
        self.ctx, self.region = layer.ctx, layer.region
        self.vocab_size = cfg.vocab_size or cfg.padded_vocab_size()

    def loss(self, x: Tensor, labels_BS: Tensor, weights_SB: Tensor | None = None) -> ScoredLabels:
        """Cross-entropy of every token, without ever holding all logits.

        Args:
            x: normed residual stream [s(/tp), b, h].
            labels_BS: int64 [b, s].
            weights_SB: of the losses [s, b] in their sum, where the backward pass follows at once and is that of the
                sum.

        Returns:
            Losses [s, b] in nats (fp32; fp64 for fp64), whether the label scored highest, bool [s, b], and the
            weighted sum.
        """
        scored: ScoredLabels = self(x, labels_BS, weights_SB)
        return scored

    def divergence(self, x: Tensor, other: OutputHead, other_x: Tensor, temperature: float) -> Tensor:
        """How far the predictions are from another head's, at a temperature, in nats of each token: [s, b]
        (:func:`megaforge.parallel.divergence.vocab_parallel_linear_divergence`). It reads weights that :meth:`loss`
        has read before.

        Args:
            x: as in :meth:`loss`.
            other: a head over the same vocabulary.
            other_x: what that one was given.
        """
        hidden, theirs = self.region.enter(x), other.region.enter(other_x)
        far = vocab_parallel_linear_divergence(
            hidden.flatten(0, 1),
            self.weight,
            theirs.flatten(0, 1),
            other.weight,
            ctx=self.ctx,
            vocab_size=self.vocab_size,
            temperature=temperature,
            ops=(self.op, other.op),
        )
        return far.view(hidden.shape[:2])

    def uniform_beyond_label(self, x: Tensor, labels_BS: Tensor) -> Tensor:
        """By how many nats the uniform distribution's cross-entropy with the predictions is beyond the label's, of each
        token: [s, b]. It is the label's score less the mean score of the vocabulary, so that two vectors of the head's
        matrix say it, and no logits are formed.

        Args:
            x, labels_BS: as in :meth:`loss`.

        Raises:
            UserError: the head's product is not a plain one.
        """
        if not isinstance(self.op, PlainLinear):
            raise UserError("--label-smoothing: the output head's matrix is quantized or adapted; leave the flag out")
        hidden, rows = self.region.enter(x), self.weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        first = self.ctx.tp.rank * rows
        labels, known = labels_BS.t() - first, self.weight[: min(max(self.vocab_size - first, 0), rows)]
        ours = (labels >= 0) & (labels < rows)
        chosen = F.embedding(labels.clamp(0, rows - 1), self.weight).to(wide) * ours.unsqueeze(-1)
        mean = known.to(wide).sum(0) / self.vocab_size
        return reduce_from_tensor_parallel(((chosen - mean) * hidden.to(wide)).sum(-1), self.ctx.tp)

    def logits(self, x: Tensor) -> Tensor:
        """Normed residual stream [s(/tp), b, h] -> [b, s, vocabulary], whole and unpadded on every rank."""
        scores: Tensor = self(x)
        return scores

    def likeliest(self, hidden: Tensor) -> Tensor:
        """The token that scores highest, int64 [...], for vectors of the normed residual stream [..., h], whole and
        the same on every rank of tp."""
        local = self.op.apply(hidden, self.weight)
        return gather_from_tensor_parallel(local, self.ctx.tp)[..., : self.vocab_size].argmax(-1)

    def forward(
        self, x: Tensor, labels_BS: Tensor | None = None, weights_SB: Tensor | None = None
    ) -> Tensor | ScoredLabels:
        """:meth:`loss` with labels, :meth:`logits` without. Called as a module, so that its hooks run."""
        hidden = self.region.enter(x)
        if labels_BS is None:
            local = self.op.apply(hidden, self.weight)
            return gather_from_tensor_parallel(local, self.ctx.tp)[..., : self.vocab_size].transpose(0, 1)
        labels = labels_BS.t().reshape(-1)
        found = vocab_parallel_linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.weight,
            labels,
            ctx=self.ctx,
            vocab_size=self.vocab_size,
            weights=None if weights_SB is None else weights_SB.reshape(-1),
            op=self.op,
        )
        shape = hidden.shape[:2]
        return found._replace(losses=found.losses.view(shape), correct=found.correct.view(shape))
