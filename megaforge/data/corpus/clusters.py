"""Clusters of near-duplicates: pairs that are alike are joined by union-find, and the best of each cluster stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from megaforge.data.corpus.records import shown_id

PAIRS = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("other", pa.int64(), nullable=False),
        ("quality", pa.float32()),
        ("other_quality", pa.float32()),
        ("length", pa.int64()),
        ("other_length", pa.int64()),
    ]
)
DECISIONS = pa.schema([pa.field("id", pa.int64(), nullable=False), ("reason", pa.string()), ("size", pa.int64())])

MOST_COMPARISONS = 256  # of a document within a group


def pairs_alike(sketches: Any, alike: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Any:
    """The pairs (:data:`PAIRS`) of rows of equal ``key`` that are alike, enough of them to join every group.

    In each group the first row is compared with all others; those that are not like it form a group of their own, until
    none is left. A group of n rows that are all alike takes n - 1 comparisons, and none takes more than n times
    ``MOST_COMPARISONS``: rows that are unlike so many of their group are set aside, each as a pair with itself. Two of
    them that are alike are still found by any other key that they have in common.

    Args:
        sketches: ``key`` uint64, ``id`` int64, ``quality`` float32, ``length`` int64.
        alike: of two arrays of row numbers, which pairs are alike [pairs] bool.
    """
    keys, ids = sketches["key"].to_numpy(), sketches["id"].to_numpy()
    rows = np.lexsort((ids, keys))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(MOST_COMPARISONS):
        if not len(rows):
            break
        first = np.ones(len(rows), bool)
        first[1:] = keys[rows[1:]] != keys[rows[:-1]]
        leader = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
        one, other = leader[~first], rows[~first]
        same = alike(one, other) & (ids[one] != ids[other])
        found.append((one[same], other[same]))
        rows = other[~same & (ids[one] != ids[other])]
    _, group, sizes = np.unique(keys[rows], return_inverse=True, return_counts=True)
    rows = rows[sizes[group] > 1]  # the last of its group was compared with all others
    found.append((rows, rows))
    one, other = (np.concatenate(side) for side in zip(*found, strict=True))
    quality, length = sketches["quality"].to_numpy(), sketches["length"].to_numpy()
    columns = [ids[one], ids[other], quality[one], quality[other], length[one], length[other]]
    return pa.Table.from_arrays([pa.array(c) for c in columns], schema=PAIRS)


def components(one: np.ndarray, other: np.ndarray, nodes: int) -> np.ndarray:
    """The smallest node that each of ``nodes`` is joined to by the pairs [nodes] int64 (union-find over arrays: roots
    are hooked to smaller roots, then every path is halved until it has one step)."""
    root = np.arange(nodes)
    while True:
        a, b = root[one], root[other]
        apart = a != b
        if not apart.any():
            return root
        np.minimum.at(root, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
        while (root[root] != root).any():
            root = root[root]


def keep_best(joined: Sequence[Any], reason: str) -> Any:
    """The decisions (:data:`DECISIONS`) about all documents of clusters: all but the best, by quality, then length,
    then order, are dropped for ``reason``; the best has none, and its cluster's ``size``."""
    pairs = pa.concat_tables(joined)
    sides = [
        np.concatenate([pairs[name].to_numpy(), pairs[f"other_{name}" if name != "id" else "other"].to_numpy()])
        for name in ("id", "quality", "length")
    ]
    ids, first, node = np.unique(sides[0], return_index=True, return_inverse=True)
    quality, length = sides[1][first], sides[2][first]
    half = pairs.num_rows
    cluster = components(node[:half], node[half:], len(ids))
    order = np.lexsort((ids, -length, -quality, cluster))
    best = np.ones(len(ids), bool)
    best[1:] = cluster[order][1:] != cluster[order][:-1]
    leader = ids[order[np.maximum.accumulate(np.where(best, np.arange(len(ids)), 0))]] if len(ids) else ids
    sizes = np.bincount(cluster, minlength=len(ids))[cluster[order]]
    reasons = [
        None if is_best else f"{reason} (of {shown_id(kept)})"
        for is_best, kept in zip(best.tolist(), leader.tolist(), strict=True)
    ]
    return pa.Table.from_arrays(
        [pa.array(ids[order]), pa.array(reasons, pa.string()), pa.array(np.where(best, sizes, 0))], schema=DECISIONS
    )


def cluster_counts(decisions: Any) -> dict[str, int]:
    """How many clusters there are of each size, in powers of two, by the documents that stay; and how many documents
    stay that were set aside."""
    sizes = decisions["size"].to_numpy()
    counts = {}
    if alone := int((sizes == 1).sum()):
        counts[f"documents unlike {MOST_COMPARISONS} of a larger group, not compared with the rest"] = alone
    for low in 2 ** np.arange(1, 40):
        if number := int(((sizes >= low) & (sizes < 2 * low)).sum()):
            counts[f"clusters of {low} to {2 * low - 1} documents"] = number
    return counts
