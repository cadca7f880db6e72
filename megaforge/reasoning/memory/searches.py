"""Which keys of a page may be among the nearest to a query, by inner products in fp32. The index
(:mod:`megaforge.reasoning.memory.episodic`) computes the products of these again in fp64, so that every search finds
the same. A search is in :data:`megaforge.registry.MEMORY_SEARCHES`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megaforge.errors import require


class Search(Protocol):
    """How one page of keys is searched."""

    def prepare(self, keys: Tensor) -> Any:
        """What is kept of fp32 keys [n, S] until one of them changes."""

    def candidates(self, prepared: Any, query: Tensor, k: int, slack: float) -> Tensor:
        """int64 [m], the places whose product with ``query``, fp32 [S], is at least the k-th highest less ``slack``,
        which is finite; all where there are no more than k."""


class TorchSearch:
    """A product with all keys."""

    def prepare(self, keys: Tensor) -> Tensor:
        return keys

    def candidates(self, prepared: Tensor, query: Tensor, k: int, slack: float) -> Tensor:
        if len(prepared) <= k:
            return torch.arange(len(prepared))
        products = prepared @ query
        least = products.topk(k).values[-1].double() - slack
        return (products.double() >= least).nonzero().flatten()


class FaissSearch:
    """Faiss' exact index of inner products (Douze et al., arXiv 2401.08281)."""

    def __init__(self) -> None:
        self._faiss = require("faiss", extra="memory", purpose="--memory-index faiss")

    def prepare(self, keys: Tensor) -> Any:
        index = self._faiss.IndexFlatIP(keys.shape[1])
        index.add(keys.numpy())
        return index

    def candidates(self, prepared: Any, query: Tensor, k: int, slack: float) -> Tensor:
        if prepared.ntotal <= k:
            return torch.arange(prepared.ntotal)
        one = query.numpy()[None]
        products, _ = prepared.search(one, k)
        # What lies above the bound is found, not what lies on it.
        bound = np.nextafter(np.float32(np.float64(products[0, -1]) - slack), np.float32(-np.inf))
        _, _, places = prepared.range_search(one, float(bound))
        return torch.from_numpy(places).sort().values
