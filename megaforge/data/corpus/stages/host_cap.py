"""At most so many documents of one host, so that no site outweighs the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from megaforge.config.fields import flag
from megaforge.data.corpus.addresses import Domains, host_of, keys_of
from megaforge.data.corpus.columns import quality_of
from megaforge.data.corpus.stage import DECISION, JoinStage, Scope, StageSettings


@dataclass(frozen=True)
class HostCapSettings(StageSettings):
    """``host_cap``: the best documents of each host; those without an address stay."""

    most: int = flag(10_000, "documents of one host", least=1)
    by: str = flag("domain", "what is one host: a registered domain, or every host name", choices=("domain", "host"))
    buckets: int = flag(16, "pieces that the comparison is cut into; more need less memory", least=1, most=1 << 16)

    def open(self, scope: Scope) -> HostCap:
        """See :class:`StageSettings`."""
        return HostCap(self, Domains("stage host_cap: by domain") if self.by == "domain" else None)


class HostCap(JoinStage):
    """Keeps the ``most`` documents of a host with the highest quality, of equals the first."""

    def __init__(self, settings: HostCapSettings, domains: Domains | None) -> None:
        self._settings, self._domains, self.buckets = settings, domains, settings.buckets

    def sketch(self, records: Any) -> Any:
        """See :class:`JoinStage`: hosts as 64-bit keys."""
        hosts = [host_of(url) if url else "" for url in records["url"].to_pylist()]
        rows = np.array([row for row, host in enumerate(hosts) if host], np.int64)
        names = [self._domains.of(hosts[row]) if self._domains else hosts[row] for row in rows]
        return pa.table(
            {
                "key": pa.array(keys_of(names), pa.uint64()),
                "id": pa.array(records["id"].to_numpy()[rows], pa.int64()),
                "quality": pa.array(quality_of(records)[rows], pa.float32()),
                "host": pa.array(names, pa.string()),
            }
        )

    def join(self, sketches: Any) -> Any:
        """See :class:`JoinStage`: a decision about every document beyond its host's cap."""
        key, ids, quality = (sketches[name].to_numpy() for name in ("key", "id", "quality"))
        order = np.lexsort((ids, -quality, key))
        key = key[order]
        first = np.ones(len(key), bool)
        first[1:] = key[1:] != key[:-1]
        rank = np.arange(len(key)) - np.maximum.accumulate(np.where(first, np.arange(len(key)), 0))
        gone = order[rank >= self._settings.most]
        names = sketches["host"].take(pa.array(gone)).to_pylist()
        reasons = [f"beyond the cap of its host ({name})" for name in names]
        return pa.table({"id": ids[gone], "reason": pa.array(reasons, pa.string())}, schema=DECISION)
