"""What the report says of a corpus, gathered from the lineage, one partition at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from megaforge.data.left_out import kind_of

# What documents are told apart by in the report.
ATTRIBUTES = ("source", "domain", "language", "licence")
_COLUMNS = ["id", *ATTRIBUTES, "path", "characters", "stage", "reason", "dataset"]
_OF_ANOTHER = re.compile(r"\(of (\d+-\d+)")
LENGTHS = tuple(int(10 ** (exponent / 4)) for exponent in range(4, 25))  # 10 to 10**6 characters


@dataclass
class ReportData:
    """Counts over all documents that were read.

    Attributes:
        kept, read: documents of each value of each of :data:`ATTRIBUTES`.
        characters: of the kept ones, by the same.
        dropped: (stage, reason) -> documents.
        examples: (stage, reason) -> a few of their ids, paths and whole reasons.
        lengths: (kept, dropped) documents in each interval of :data:`LENGTHS`.
        clusters: the kept document -> how many were dropped because they are like it.
        entropy: bits of a byte of the kept text, and of a byte whose predecessor is known.
    """

    kept: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in ATTRIBUTES})
    read: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in ATTRIBUTES})
    characters: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in ATTRIBUTES})
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    lengths: Any = field(default_factory=lambda: np.zeros((2, len(LENGTHS) + 1), np.int64))
    clusters: Counter[str] = field(default_factory=Counter)
    entropy: tuple[float, float] = (0.0, 0.0)


def gather(lineage: Path, pairs: Path) -> ReportData:
    """Reads the lineage, and how often each pair of bytes is in the kept text."""
    data = ReportData()
    for file in sorted(lineage.glob("*.parquet")):
        _add(data, pq.read_table(file, columns=_COLUMNS))
    data.entropy = entropies(sum((np.load(file) for file in pairs.glob("*.npy")), np.zeros(1 << 16, np.int64)))
    return data


def entropies(pairs: Any) -> tuple[float, float]:
    """Bits of a byte, and of a byte whose predecessor is known, of counts of pairs (int64 [65536])."""
    table = pairs.reshape(256, 256).astype(np.float64)
    both = _bits(table.ravel())
    first = _bits(table.sum(1))
    return first, both - first


def _bits(counts: Any) -> float:
    total = counts.sum()
    shares = counts[counts > 0] / total if total else counts[:0]
    return float(-(shares * np.log2(shares)).sum())


def _add(data: ReportData, table: Any) -> None:
    columns = {name: table[name].to_pylist() for name in _COLUMNS}
    edges = np.array(LENGTHS)
    buckets = np.searchsorted(edges, np.array(columns["characters"], np.int64), side="right")
    kept = np.array([name is not None for name in columns["dataset"]], bool)
    for row, is_kept in enumerate((kept, ~kept)):
        data.lengths[row] += np.bincount(buckets[is_kept], minlength=len(LENGTHS) + 1)
    for name in ATTRIBUTES:
        for value, size, stays in zip(columns[name], columns["characters"], kept.tolist(), strict=True):
            value = value or "?"
            data.read[name][value] += 1
            if stays:
                data.kept[name][value] += 1
                data.characters[name][value] += size
    for identity, path, stage, reason in _dropped(columns):
        key = (stage, kind_of(reason))
        data.dropped[key] += 1
        examples = data.examples.setdefault(key, [])
        if len(examples) < 3:
            examples.append(f"{identity >> 32}-{identity & 0xFFFFFFFF} {path}: {reason}")
        like = _OF_ANOTHER.search(reason)
        if like is not None:
            data.clusters[like[1]] += 1


def _dropped(columns: dict[str, list[Any]]) -> Iterator[tuple[int, str, str, str]]:
    rows = zip(columns["id"], columns["path"], columns["stage"], columns["reason"], strict=True)
    return ((identity, path, stage, reason) for identity, path, stage, reason in rows if reason is not None)
