"""Softmax cross-entropy from rows of logits that exist for a moment: :func:`score_labels`.

Each way is one walk over the logits as they are: on GPUs a Triton kernel (:mod:`.triton`), on CPUs compiled code
(:mod:`.native`). Elsewhere it is plain torch (:mod:`.plain`); :mod:`.reference` has the definitions.
"""

from __future__ import annotations

from torch import Tensor

from megaforge.kernels.cross_entropy import native
from megaforge.kernels.cross_entropy.plain import PlainScores, Scores
from megaforge.kernels.cross_entropy.triton import TritonScores, takes

__all__ = ["Scores", "score_labels"]


def score_labels(logits: Tensor, target: Tensor, columns: int) -> Scores:
    """What the loss of some tokens, and its gradient, is computed from.

    Args:
        logits: [T, V], used up.
        target: int64 [T], each token's column; one that is not among the first ``columns`` is held elsewhere.
        columns: how many take part, 0 to V.
    """
    if takes(logits):
        return TritonScores(logits, target, columns)
    made = native.CompiledScores if native.takes(logits) else PlainScores
    return made(logits, target, columns)
