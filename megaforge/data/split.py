"""Which documents of a source are for training, validation and test (``--split``, ``--split-order``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megaforge.data.blend import split_ranges
from megaforge.data.sample_order import key_of, splitmix64

PARTS = ("train", "valid", "test")
Documents = slice | npt.NDArray[np.int64]

_SPLIT_SEED = 1


def split_documents(shares: Sequence[float], order: str, digest: str, documents: int) -> Mapping[str, Documents]:
    """The document numbers of each part, as an index into arrays of all ``documents``.

    ``sequential`` gives contiguous ranges, as Megatron does. ``shuffled`` draws the documents by a keyed hash of their
    numbers: it depends on the source's content alone, not on ``--seed``, so that replicates of a run hold out the same
    documents, nor on the run's length or layout or on other sources. Training documents then come in file order (each
    epoch shuffles them anyway), the others in the drawn order: any first part of them represents the whole source.

    Args:
        shares: of train, valid and test; they add up to 1.
        order: ``shuffled`` or ``sequential``.
        digest: :func:`megaforge.data.sidecar.content_digest` of the source.
    """
    ranges = dict(zip(PARTS, split_ranges(shares, documents), strict=True))
    if order == "sequential" or any(stop - first == documents for first, stop in ranges.values()):
        return {part: slice(first, stop) for part, (first, stop) in ranges.items()}
    hashes = splitmix64(key_of("split", _SPLIT_SEED, digest), np.arange(documents, dtype=np.uint64))
    edges = sorted({edge for bounds in ranges.values() for edge in bounds if 0 < edge < documents})
    ordered = np.partition(hashes, edges)
    chosen: dict[str, Documents] = {}
    for part, (first, stop) in ranges.items():
        inside = np.full(documents, first < stop)
        if 0 < first < documents:
            inside &= hashes >= ordered[first]
        if stop < documents:
            inside &= hashes < ordered[stop]
        numbers = np.flatnonzero(inside)
        chosen[part] = numbers if part == "train" else numbers[np.argsort(hashes[numbers])]
    return chosen
