"""Multi-token prediction as the model sees it: at each place also the second token after it, the third, ... are
predicted, by modules that share the model's embedding and head.

A mode (:mod:`megaforge.models.multi_token` has ours) is registered in :data:`megaforge.registry.MULTI_TOKEN`. Its
modules stand behind the model's last block, on the last pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import ahead_of
from megaforge.models.generation_state import GenerationState
from megaforge.nn.head import OutputHead
from megaforge.nn.losses import LossTerm
from megaforge.nn.moe import RouterLosses
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.registry import MULTI_TOKEN


@dataclass(frozen=True)
class Ends:
    """What the model's last stage gives its further predictions.

    Attributes:
        before: residual stream [s(/tp), b, h] in front of the last block.
        hidden: what the head was given, [s(/tp), b, h].
        final_norm, head: the model's.
    """

    before: Tensor
    hidden: Tensor
    final_norm: nn.Module
    head: OutputHead

    def rows(self, chosen: slice) -> Ends:
        """Of some of the tokens."""
        return replace(self, before=self.before[chosen], hidden=self.hidden[chosen])


class Drafts(Protocol):
    """What further predictions propose while the model writes one text."""

    def take(self, ends: Ends, tokens: Sequence[int]) -> None:
        """Takes in the next tokens of the text.

        Args:
            ends: of these.
            tokens: all so far, and the one that follows them, which the model has not seen.
        """

    def propose(self, tokens: Sequence[int]) -> list[int]:
        """One token for each further prediction, as they would follow ``tokens``, those of the last :meth:`take`."""


Pack = Callable[[Tensor, Tensor | None, GenerationState], PackedSequence]


class Prediction(NamedTuple):
    """Of one further prediction: the sum over this rank's tokens of loss mask * cross-entropy in nats, and the losses
    of its routers."""

    loss_sum: Tensor
    routed: list[RouterLosses]


class MultiToken(nn.Module):
    """The modules of all further predictions; ``depths`` in order.

    Attributes:
        reads_tokens: whether a module looks tokens up in the model's embedding.
    """

    reads_tokens = False
    depths: nn.ModuleList

    def looked_up(self) -> nn.Parameter:
        """The embedding's matrix as a mode has it that reads tokens."""
        raise NotImplementedError

    def forward(
        self, ends: Ends, tokens: Sequence[Tensor], targets: Sequence[tuple[Tensor, Tensor]], info: PackedSequence
    ) -> list[Prediction]:
        """
        Args:
            tokens: int64 [b, s], of each prediction the token in front of the predicted one: at first the label, then
                the one after it, ...
            targets: of each prediction its labels int64 [b, s] and their loss mask [b, s].
            info: the micro-batch's sequences; all are this rank's tokens of them.
        """
        raise NotImplementedError

    def drafts(self, pack: Pack) -> Drafts:
        """For one text, from its beginning. ``pack``: :meth:`HybridModel.pack`."""
        raise NotImplementedError


def make_multi_token(layer: LayerContext, embedding_weight: nn.Parameter | None) -> MultiToken | None:
    """The modules that the flags ask for; None: the next token alone is predicted.

    Args:
        embedding_weight: the model's embedding, where this stage has it.
    """
    if not ahead_of(layer.cfg):
        return None
    made: MultiToken = MULTI_TOKEN.get(layer.cfg.mtp_mode)(layer, embedding_weight)
    return made


def terms_of(predictions: Sequence[Prediction], cfg: ModelConfig) -> dict[str, LossTerm]:
    """The loss terms ``mtp_loss/N``, each a mean over the labels that count for it."""
    weight = cfg.mtp_weight(max(len(predictions), 1))
    return {
        f"mtp_loss/{number}": LossTerm(one.loss_sum, f"mtp_labels/{number}", weight)
        for number, one in enumerate(predictions, start=1)
    }


def embedding_is_shared(cfg: ModelConfig) -> bool:
    """Whether the last stage reads the embedding's matrix too: as its head, or to look tokens up."""
    if not cfg.untie_embeddings_and_output_weights:
        return True
    return bool(ahead_of(cfg)) and bool(MULTI_TOKEN.get(cfg.mtp_mode).reads_tokens)
