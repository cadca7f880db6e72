"""The state-space recurrence of Mamba-2 ("SSD": Dao and Gu, arXiv 2405.21060), one decay a head.

Per head, with a state S of [channel, state channel], a step d_t, a decay a and a skip D::

    S_t = exp(a d_t) S_{t-1} + d_t x_t b_t^T        y_t = S_t c_t + D x_t

Heads share b and c in groups of neighbours. :func:`ssd` is the face. :func:`ssd_recurrent` is the definition, token by
token: the oracle of the others. :mod:`.chunked` is plain torch, in chunks.
"""

from __future__ import annotations

from torch import Tensor

from megaforge.kernels.ssd.chunked import CHUNK, ssd_chunked
from megaforge.kernels.ssd.piece import SSD, Piece
from megaforge.kernels.ssd.reference import ssd_recurrent

__all__ = ["CHUNK", "SSD", "Piece", "ssd", "ssd_chunked", "ssd_recurrent"]


def ssd(
    x: Tensor,
    step: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences in plain torch, differentiable in every floating-point argument.

    Args:
        x: [s, b, H, P], any floating-point dtype.
        step: [s, b, H], above zero; what softplus has made of dt.
        a: [H], at most zero: A.
        b, c: [s, b, G, N]; each of the G groups serves H / G neighbouring heads.
        skip: [H], D.
        initial_state: [b, H, P, N], zero when None.
        document_start: bool [s, b]; the state is zero before a token where it is true.

    Returns:
        y [s, b, H, P] in the dtype of ``x`` and the final state [b, H, P, N], in fp32 (fp64 for fp64 inputs).
    """
    return ssd_chunked(x, step, a, b, c, skip, document_start).output(initial_state)
