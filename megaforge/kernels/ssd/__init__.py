"""The state-space recurrence of Mamba-2 ("SSD": Dao and Gu, arXiv 2405.21060), one decay a head.

Per head, with a state S of [channel, state channel]::

    S_t = exp(log_a_t) S_{t-1} + x_t b_t^T        y_t = S_t c_t

Heads share b and c in groups of neighbours. :func:`ssd` is the face and plain torch, in chunks; :func:`ssd_recurrent`
is the definition, token by token: the oracle of the other.
"""

from __future__ import annotations

from megaforge.kernels.ssd.chunked import CHUNK, Chunks, chunks_of, ssd
from megaforge.kernels.ssd.reference import ssd_recurrent

__all__ = ["CHUNK", "Chunks", "chunks_of", "ssd", "ssd_recurrent"]
