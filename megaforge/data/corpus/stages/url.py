"""Documents of one web address: one of them stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.config.fields import flag
from megaforge.data.corpus.addresses import canonical, keys_of
from megaforge.data.corpus.columns import one_array, quality_of
from megaforge.data.corpus.records import shown_id
from megaforge.data.corpus.stage import DECISION, JoinStage, Scope, StageSettings


@dataclass(frozen=True)
class UrlSettings(StageSettings):
    """``url``: documents of one address, tracking parameters and the like aside; those without an address stay."""

    keep: str = flag("best", "which stays: the best by quality, or the newest by date", choices=("best", "newest"))
    buckets: int = flag(16, "pieces that the comparison is cut into; more need less memory", least=1, most=1 << 16)

    def open(self, scope: Scope) -> Url:
        """See :class:`StageSettings`."""
        return Url(self)


class Url(JoinStage):
    """Keeps the best (or newest) document of each address; of equals the first."""

    def __init__(self, settings: UrlSettings) -> None:
        self._newest, self.buckets = settings.keep == "newest", settings.buckets

    def sketch(self, records: Any) -> Any:
        """See :class:`JoinStage`: addresses as 64-bit keys."""
        rows = np.flatnonzero(pc.is_valid(records["url"]).to_numpy())
        chosen = records.take(rows)
        dates = pc.fill_null(one_array(chosen["date"]), "") if self._newest else [""] * len(rows)
        return pa.table(
            {
                "key": keys_of([canonical(url) for url in chosen["url"].to_pylist()]),
                "id": pa.array(chosen["id"].to_numpy(), pa.int64()),
                "quality": pa.array(quality_of(chosen), pa.float32()),
                "date": pa.array(dates, pa.large_string()),
            }
        )

    def join(self, sketches: Any) -> Any:
        """See :class:`JoinStage`: a decision about every document but the one of its address that stays."""
        key, ids, quality = (sketches[name].to_numpy() for name in ("key", "id", "quality"))
        _, age = np.unique(sketches["date"].to_numpy().astype(str), return_inverse=True)
        order = np.lexsort((ids, -quality, -age, key))
        key, ids = key[order], ids[order]
        first = np.ones(len(ids), bool)
        first[1:] = key[1:] != key[:-1]
        best = ids[np.maximum.accumulate(np.where(first, np.arange(len(ids)), 0))]
        reasons = [f"the address of another document (of {shown_id(int(one))})" for one in best[~first]]
        return pa.table({"id": ids[~first], "reason": pa.array(reasons, pa.string())}, schema=DECISION)
