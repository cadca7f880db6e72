"""Sequences of different lengths as one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pad_batch(
    sequences: Sequence[Sequence[int] | npt.NDArray[np.integer]],
    *,
    pad: int = 0,
    length: int | None = None,
    padding: str = "right",
    truncation: str = "right",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The sequences in rows of one length, and where their own ids are.

    Args:
        sequences: ids, as :meth:`megaforge.data.tokenizer.Tokenizer.encode_batch` gives them.
        pad: the id that fills rows up (``Tokenizer.pad`` where there is one; any id will do under a mask).
        length: of a row; None: of the longest sequence.
        padding: the side that is filled up, left or right.
        truncation: the side that a longer sequence loses, left or right.

    Returns:
        int64 [b, length] ids and bool [b, length], true where an id is the sequence's own.

    Raises:
        ValueError: a side is neither left nor right.
    """
    for side in (padding, truncation):
        if side not in ("left", "right"):
            raise ValueError(f"{side!r}: choose left or right")
    length = max(map(len, sequences), default=0) if length is None else length
    ids = np.full((len(sequences), length), pad, np.int64)
    mask = np.zeros(ids.shape, np.bool_)
    for row, sequence in enumerate(sequences):
        kept = sequence[:length] if truncation == "right" else sequence[max(0, len(sequence) - length) :]
        place = slice(0, len(kept)) if padding == "right" else slice(length - len(kept), length)
        ids[row, place] = kept
        mask[row, place] = True
    return ids, mask
