"""Documents whose text another document has too, to the byte: one of them stays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from megaforge.config.fields import flag
from megaforge.data.corpus.records import shown_id
from megaforge.data.corpus.stage import DECISION, JoinStage, Scope, StageSettings

_SKETCH = pa.schema(
    [("key", pa.uint64()), ("rest", pa.uint64()), pa.field("id", pa.int64(), nullable=False), ("quality", pa.float32())]
)


@dataclass(frozen=True)
class ExactSettings(StageSettings):
    """``exact``: documents of equal text."""

    buckets: int = flag(16, "pieces that the comparison is cut into; more need less memory", least=1, most=1 << 16)

    def open(self, scope: Scope) -> Exact:
        """See :class:`StageSettings`."""
        return Exact(self)


class Exact(JoinStage):
    """Keeps the best of equal documents: the highest quality, where it was scored, and the first of these."""

    def __init__(self, settings: ExactSettings) -> None:
        self.buckets = settings.buckets

    def sketch(self, records: Any) -> Any:
        """See :class:`JoinStage`: 128 bits of each text's SHA-256."""
        digests = [hashlib.sha256(text.encode()).digest()[:16] for text in records["text"].to_pylist()]
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        quality = records["quality"].combine_chunks()
        ids = records["id"].combine_chunks()
        return pa.Table.from_arrays([pa.array(halves[:, 0]), pa.array(halves[:, 1]), ids, quality], schema=_SKETCH)

    def join(self, sketches: Any) -> Any:
        """See :class:`JoinStage`: a decision about every document but the best of its text."""
        key, rest, ids = (sketches[name].to_numpy() for name in ("key", "rest", "id"))
        quality = np.nan_to_num(sketches["quality"].to_numpy().astype(np.float32), nan=-1.0)
        order = np.lexsort((ids, -quality, rest, key))
        key, rest, ids = key[order], rest[order], ids[order]
        first = np.ones(len(ids), bool)
        first[1:] = (key[1:] != key[:-1]) | (rest[1:] != rest[:-1])
        best = ids[np.maximum.accumulate(np.where(first, np.arange(len(ids)), 0))] if len(ids) else ids
        gone, kept = ids[~first], best[~first]
        reasons = [f"the same text as another document (of {shown_id(int(one))})" for one in kept]
        return pa.Table.from_arrays([pa.array(gone, pa.int64()), pa.array(reasons, pa.string())], schema=DECISION)
